"""Sixteen float32, uint32 or boolean lanes as values inside numba functions.

A loop over table look-ups or butterflies is beyond LLVM's vectoriser; written with these values it needs
none. Every operation is generic LLVM IR, which any CPU can run with the same bits: sixteen lanes are one
register with AVX-512, two with AVX2, four with NEON. What only AVX-512 has is in lookup.py.

Arithmetic is IEEE float32 in the order written: no contraction to fused multiply-add, no reassociation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from llvmlite import ir
from numba import extending
from numba.core import types as numba_types
from numba.core.datamodel import PrimitiveModel
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature

LANES = 16

types: Any = numba_types  # made at run time for the most part
_WORD: Any = ir.IntType(32)
intrinsic = extending.intrinsic
_Emit = Callable[..., Any]


class VectorType(numba_types.Type):
    """The numba type of a vector of LANES lanes of one LLVM type."""

    def __init__(self, name: str, lane: Any) -> None:
        self.llvm = ir.VectorType(lane, LANES)
        super().__init__(name)


@extending.register_model(VectorType)
class _VectorModel(PrimitiveModel):
    def __init__(self, manager: Any, fe_type: VectorType) -> None:
        super().__init__(manager, fe_type, fe_type.llvm)


F32 = VectorType("f32x16", ir.FloatType())
U32 = VectorType("u32x16", _WORD)
MASK = VectorType("mask16", ir.IntType(1))


def _define(op: Callable[..., Any], operands: tuple[VectorType, VectorType], result: VectorType, emit: _Emit) -> None:
    """Let a Python operator on two vectors become one LLVM instruction."""

    class Template(ConcreteTemplate):
        cases: ClassVar = [signature(result, *operands)]

    infer_global(op)(Template)
    extending.lower_builtin(op, *operands)(lambda context, builder, sig, args: emit(builder, *args))


def _define_operators() -> None:
    arithmetic = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}
    for op, name in arithmetic.items():
        _define(op, (F32, F32), F32, lambda builder, a, b, name=name: getattr(builder, name)(a, b))
    integer = {
        operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.and_: "and_", operator.or_: "or_",
        operator.xor: "xor", operator.lshift: "shl", operator.rshift: "lshr",
    }  # fmt: skip
    for op, name in integer.items():
        _define(op, (U32, U32), U32, lambda builder, a, b, name=name: getattr(builder, name)(a, b))
    for op, sign in ((operator.gt, ">"), (operator.ge, ">="), (operator.lt, "<")):
        _define(op, (F32, F32), MASK, lambda builder, a, b, sign=sign: builder.fcmp_ordered(sign, a, b))
        _define(op, (U32, U32), MASK, lambda builder, a, b, sign=sign: builder.icmp_unsigned(sign, a, b))


_define_operators()


def constant(values: Sequence[int]) -> Any:
    """A constant vector, for an intrinsic."""
    return ir.Constant(ir.VectorType(_WORD, len(values)), list(values))


@intrinsic
def splat(typing_context: Any, value: Any) -> Any:
    """All lanes `value`: a float32 gives F32, an integer U32."""
    result = F32 if value == types.float32 else U32
    if result is U32 and not isinstance(value, types.Integer):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lane = args[0] if result is F32 else context.cast(builder, args[0], value, types.uint32)
        vector = builder.insert_element(ir.Constant(result.llvm, ir.Undefined), lane, ir.Constant(_WORD, 0))
        return builder.shuffle_vector(vector, vector, constant([0] * LANES))

    return result(value), codegen


def is_flat(array: Any) -> bool:
    """Whether a numba type is that of a contiguous array of one dimension."""
    return isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C"


def data_of(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The address of the first item of an array of the numba type `kind`, for an intrinsic."""
    return context.make_array(kind)(context, builder, array).data


@intrinsic
def load(typing_context: Any, array: Any, start: Any) -> Any:
    """Items start..start+15 of a flat array: float32 as F32, unsigned integers widened to U32. Unchecked."""
    if not is_flat(array):
        return None
    bits = array.dtype.bitwidth
    result = F32 if array.dtype == types.float32 else U32

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        stored = F32.llvm if result is F32 else ir.VectorType(ir.IntType(bits), LANES)
        place = builder.gep(data_of(context, builder, array, args[0]), [args[1]])
        vector = builder.load(builder.bitcast(place, stored.as_pointer()), align=bits // 8)
        return vector if bits == 32 else builder.zext(vector, result.llvm)

    return result(array, types.intp), codegen


@intrinsic
def store(typing_context: Any, array: Any, start: Any, vector: Any) -> Any:
    """Write a U32 to items start..start+15 of a flat array of integers, each cut to its width, or an F32 to those of
    a flat array of float32. Unchecked."""
    if not is_flat(array) or (vector is F32) != (array.dtype == types.float32):
        return None
    bits = array.dtype.bitwidth

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        stored = F32.llvm if vector is F32 else ir.VectorType(ir.IntType(bits), LANES)
        value = args[2] if bits == 32 else builder.trunc(args[2], stored)
        place = builder.gep(data_of(context, builder, array, args[0]), [args[1]])
        builder.store(value, builder.bitcast(place, stored.as_pointer()), align=bits // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def load_word(typing_context: Any, array: Any, start: Any) -> Any:
    """Bytes start..start+7 of a flat uint8 array as one uint64, little-endian. Unchecked."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.gep(data_of(context, builder, array, args[0]), [args[1]])
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return (types.uint64(array, types.intp), codegen) if is_flat(array) and array.dtype == types.uint8 else None


@intrinsic
def store_word(typing_context: Any, array: Any, start: Any, word: Any) -> Any:
    """Write a uint64 to bytes start..start+7 of a flat uint8 array, little-endian. Unchecked."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.gep(data_of(context, builder, array, args[0]), [args[1]])
        builder.store(args[2], builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    good = is_flat(array) and array.dtype == types.uint8 and word == types.uint64
    return (types.void(array, types.intp, word), codegen) if good else None


@intrinsic
def select(typing_context: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lane by lane `a` where `mask`, else `b`."""
    if mask is not MASK or a is not b:
        return None
    return a(mask, a, b), lambda context, builder, sig, args: builder.select(*args)


@intrinsic
def ones(typing_context: Any, mask: Any) -> Any:
    """U32 of 1 where `mask`, else 0."""
    return U32(MASK), lambda context, builder, sig, args: builder.zext(args[0], U32.llvm)


@intrinsic
def as_bits(typing_context: Any, vector: Any) -> Any:
    """The bit patterns of an F32 as U32."""
    return U32(F32), lambda context, builder, sig, args: builder.bitcast(args[0], U32.llvm)


@intrinsic
def as_floats(typing_context: Any, vector: Any) -> Any:
    """The F32 of bit patterns."""
    return F32(U32), lambda context, builder, sig, args: builder.bitcast(args[0], F32.llvm)


@intrinsic
def to_floats(typing_context: Any, vector: Any) -> Any:
    """The F32 nearest to the numbers of a U32."""
    return F32(U32), lambda context, builder, sig, args: builder.uitofp(args[0], F32.llvm)


@intrinsic
def to_integers(typing_context: Any, vector: Any) -> Any:
    """The U32 of an F32 without its fractions; from 0 to below 2**32."""
    return U32(F32), lambda context, builder, sig, args: builder.fptoui(args[0], U32.llvm)


@intrinsic
def evens(typing_context: Any, a: Any, b: Any) -> Any:
    """Items 0, 2, 4, ... of the 32 in `a` and `b`."""
    return a(a, b), lambda context, builder, sig, args: builder.shuffle_vector(*args, constant(range(0, 2 * LANES, 2)))


@intrinsic
def odds(typing_context: Any, a: Any, b: Any) -> Any:
    """Items 1, 3, 5, ... of the 32 in `a` and `b`."""
    return a(a, b), lambda context, builder, sig, args: builder.shuffle_vector(*args, constant(range(1, 2 * LANES, 2)))


@intrinsic
def first(typing_context: Any, vector: Any) -> Any:
    """Lane 0: a float32 or uint32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(_WORD, 0))

    return (types.float32 if vector is F32 else types.uint32)(vector), codegen


@intrinsic
def fold(typing_context: Any, vector: Any) -> Any:
    """The sum of all lanes as a tree: the upper half is added to the lower half, four times."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        total, width = args[0], LANES
        while width > 1:
            width //= 2
            low = builder.shuffle_vector(total, total, constant(range(width)))
            high = builder.shuffle_vector(total, total, constant(range(width, 2 * width)))
            total = builder.fadd(low, high) if vector is F32 else builder.add(low, high)
        return builder.extract_element(total, ir.Constant(_WORD, 0))

    return (types.float32 if vector is F32 else types.uint32)(vector), codegen
