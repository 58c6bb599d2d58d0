"""Look-ups and moves of lanes that AVX-512 has instructions for.

`take` has a second form for other CPUs. Who calls one of the others has a loop of its own for those, and chooses by
`WIDE`, a constant when it is compiled.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.config import CPU_FEATURES

from .vectors import F32, LANES, MASK, U32, constant, data_of, intrinsic, is_flat, types

_features = get_host_cpu_features() if CPU_FEATURES is None else CPU_FEATURES
WIDE = "+avx512f" in _features.split(",")
"""Whether the CPU that numba compiles for has AVX-512."""

_I32: Any = ir.IntType(32)
_MASK_WORD: Any = ir.IntType(LANES)


def _declare(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@intrinsic
def gather(typing_context: Any, array: Any, index: Any) -> Any:
    """Items `index`, a U32, of a flat array: float32 as F32, unsigned integers as U32. Unchecked; of uint8 and uint16
    four bytes are read from each place, so the array has as many behind the last."""
    if not is_flat(array) or index is not U32:
        return None
    bits = array.dtype.bitwidth
    result = F32 if array.dtype == types.float32 else U32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        name = f"llvm.x86.avx512.mask.gather.dp{'s' if result is F32 else 'i'}.512"
        function = _declare(builder, name, result.llvm, result.llvm, byte, U32.llvm, MASK.llvm, _I32)
        every = ir.Constant(MASK.llvm, [1] * LANES)
        place = builder.bitcast(data_of(context, builder, array, args[0]), byte)
        zeros = ir.Constant(result.llvm, [0] * LANES)
        found = builder.call(function, [zeros, place, args[1], every, ir.Constant(_I32, bits // 8)])
        if bits == 32:
            return found
        return builder.and_(found, constant([(1 << bits) - 1] * LANES))

    return result(array, index), codegen


@intrinsic
def count(typing_context: Any, mask: Any) -> Any:
    """How many lanes of a mask are set: an intp."""
    if mask is not MASK:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.ctpop(builder.bitcast(args[0], _MASK_WORD)), ir.IntType(types.intp.bitwidth))

    return types.intp(mask), codegen


@intrinsic
def expand(typing_context: Any, vector: Any, mask: Any) -> Any:
    """A U32 whose lanes in `mask` are the first items of `vector` in order; the others are 0."""
    if vector is not U32 or mask is not MASK:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = _declare(builder, "llvm.x86.avx512.mask.expand.v16i32", U32.llvm, U32.llvm, U32.llvm, MASK.llvm)
        return builder.call(function, [args[0], constant([0] * LANES), args[1]])

    return U32(vector, mask), codegen


@intrinsic
def compress(typing_context: Any, vector: Any, mask: Any) -> Any:
    """A U32 whose last lanes are the lanes of `vector` in `mask` in order; those before are of no use."""
    if vector is not U32 or mask is not MASK:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function = _declare(builder, "llvm.x86.avx512.mask.compress.v16i32", U32.llvm, U32.llvm, U32.llvm, MASK.llvm)
        first = builder.call(function, [args[0], constant([0] * LANES), args[1]])
        number = builder.zext(builder.ctpop(builder.bitcast(args[1], _MASK_WORD)), _I32)
        undefined, zero = ir.Constant(U32.llvm, ir.Undefined), ir.Constant(_I32, 0)
        spread = builder.insert_element(undefined, number, zero)
        spread = builder.shuffle_vector(spread, spread, constant([0] * LANES))
        index = builder.add(constant(range(LANES)), spread)  # the instruction takes it modulo 16
        permute = _declare(builder, "llvm.x86.avx512.permvar.si.512", U32.llvm, U32.llvm, U32.llvm)
        return builder.call(permute, [first, index])

    return U32(vector, mask), codegen


@intrinsic
def take(typing_context: Any, table: Any, index: Any) -> Any:
    """Look up `index`, each lane below 16 * len(table), in the rows of 16 float32 of `table`: a tuple of an even
    number of arrays, which must be the rows of one contiguous array. Unchecked."""
    if not isinstance(table, types.UniTuple) or not is_flat(table.dtype) or len(table) % 2:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = cgutils.unpack_tuple(builder, args[0], len(table))
        places = [data_of(context, builder, table.dtype, row) for row in rows]
        emit = _take_permuting if WIDE else _take_loading
        return emit(builder, places, args[1])

    return F32(table, index), codegen


def _take_permuting(builder: Any, places: list[Any], index: Any) -> Any:
    rows = [builder.load(builder.bitcast(place, F32.llvm.as_pointer()), align=4) for place in places]
    permute = _declare(builder, "llvm.x86.avx512.vpermi2var.ps.512", F32.llvm, F32.llvm, U32.llvm, F32.llvm)
    # the instruction looks at the low five bits of each index; the higher ones choose among its results
    found = [builder.call(permute, [rows[i], index, rows[i + 1]]) for i in range(0, len(rows), 2)]
    bit = 32
    while len(found) > 1:
        is_set = builder.icmp_unsigned("!=", builder.and_(index, constant([bit] * LANES)), constant([0] * LANES))
        found = [builder.select(is_set, found[i + 1], found[i]) for i in range(0, len(found), 2)]
        bit *= 2
    return found[0]


def _take_loading(builder: Any, places: list[Any], index: Any) -> Any:
    vector = ir.Constant(F32.llvm, ir.Undefined)
    for i in range(LANES):
        lane = ir.Constant(_I32, i)
        item = builder.load(builder.gep(places[0], [builder.extract_element(index, lane)]))
        vector = builder.insert_element(vector, item, lane)
    return vector
