"""What scripts/benchmark_cuda.py measures beside scalar codes: a trellis, and layers whose weights stay packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from benchmark_timing import Copies, Row, measure_kernel, seconds_on_device

from hlwq_convert import trellis
from hlwq_convert.kernels.trellis import encoder
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.quantize import CHUNK, choose_exponent, power_of_two
from hlwq_convert.rotate import sign_vector
from hlwq_convert.runtime import packed_gpu
from hlwq_convert.runtime.gpu import sign_words
from hlwq_convert.runtime.launch_trellis import DeviceTrellis, search, trellis_in_place
from hlwq_formats import rans
from hlwq_formats.dtypes import narrow

_STEP = 0.113
"""Of weights N(0, 1): about 4.25 bits each."""
_SOME = 1 << 22

SHAPES = ((4096, 4096), (12288, 4096), (4096, 12288), (151936, 4096))
"""Rows and columns of layers as Qwen3-8B has them: q or o, gate or up, down, the head."""

_COLD = 250_000_000
"""Bytes of matrices that take turns, so that none is in the cache of the GPU when it is used again."""

Layer = Callable[..., torch.Tensor]


def some_chunks() -> tuple[trellis.TrellisCode, list[bytes]]:
    """The code of some million weights in rows of 4,096, and its chunks."""
    rng = np.random.default_rng(0)
    some = (rng.standard_normal(_SOME) * 0.02).astype(np.float32)
    exponent = choose_exponent(float(np.abs(some).max()))
    scales = trellis.row_scales(trellis.row_energies(some, 4096), 4096, exponent)
    plain = trellis.plain_code("BF16", 4096, 8, exponent, _STEP, scales, sign_vector())
    steps = trellis.to_steps(some[: 1 << 18] * power_of_two(-exponent), 0, plain)
    code = trellis.fit(plain, steps, trellis.find_indices(steps, 8))
    raw, encode = narrow(some, "BF16").tobytes(), encoder(code)
    return code, [c for at in range(0, _SOME, CHUNK) for c in encode(raw[2 * at : 2 * (at + CHUNK)], at).chunks]


def trellis_rows(weights: int) -> list[Row]:
    """Decoding of some million weights, over and over until there are `weights`, and searching."""
    code, chunks = some_chunks()
    times = max(1, weights // _SOME)
    device = torch.device("cuda", 0)
    decoder = DeviceTrellis.of(replace(code, row_scales=np.tile(code.row_scales, times)), device)
    words = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.int16).to(device).repeat(times)
    ends = np.cumsum(np.tile([len(chunk) // 2 for chunk in chunks], times))
    places = torch.from_numpy(np.append(0, ends)).to(device)
    result = torch.empty(times * _SOME, dtype=torch.bfloat16, device=device)
    last = torch.empty(128, dtype=torch.bfloat16, device=device)
    moved = words.nbytes + result.nbytes
    copies = Copies(moved)
    rows = []
    for n_chunks in (len(places) - 1, 64):
        count = min(len(result), n_chunks * rans.CHUNK)
        rows.append(
            measure_kernel(
                f"decode a trellis, {8 * words.nbytes / len(result):.2f} bits, {n_chunks} chunks", copies, count,
                moved * count // len(result),
                lambda n=n_chunks, c=count: decoder.decode(words, places[: n + 1], 0, result[:c], last),
            )
        )  # fmt: skip
    coordinates = torch.randn((1 << 15, rans.SEGMENT), device=device) * 3
    for states in rans.TRELLISES:
        tables = [table.to(device) for table in trellis_in_place(states, rans.SEGMENT)]
        rows.append(
            measure_kernel(
                f"search, {states} states", copies, coordinates.numel(), 8 * coordinates.numel(),
                lambda s=states, t=tables: search(coordinates, s, t),
            )
        )  # fmt: skip
    return rows


def seconds_in_a_graph(work: Callable[[int], object], count: int) -> float:
    """The time of one of `count` calls in a CUDA graph, without what launching them from Python takes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            work(i)
    return seconds_on_device(graph.replay) / count


def layer_rows(bits: int = 5) -> list[Row]:
    """Packed layers against torch's linear in bfloat16, from one activation to what a prompt has."""
    rows = []
    for height, width in SHAPES:
        rows += _layer_rows(height, width, bits)
        torch.cuda.empty_cache()
    return rows


def trellis_layer_rows() -> list[Row]:
    """The same for layers of a trellis: decoded whole, then multiplied by torch."""
    code, chunks = some_chunks()
    rows = []
    for height, width in SHAPES:
        rows += _trellis_layer_rows(height, width, code, chunks)
        torch.cuda.empty_cache()
    return rows


def _trellis_layer_rows(height: int, width: int, code: trellis.TrellisCode, chunks: list[bytes]) -> list[Row]:
    n_chunks = height * width // rans.CHUNK
    mine = [chunks[number % len(chunks)] for number in range(n_chunks)]
    data, ends = b"".join(mine), np.cumsum([0, *map(len, mine)])
    arrays = np.frombuffer(data + bytes(-len(data) % 4), np.uint8), ends, np.resize(code.row_scales, height)
    tables = code.pairs.view(np.int16), code.signs.astype(np.int8)
    stored = [torch.from_numpy(array.copy()).to("cuda") for array in (*arrays, *tables)]
    settings = [width, code.states, code.step, code.step_exponent]

    def packed(i: int, x: torch.Tensor) -> torch.Tensor:
        weights, _ = packed_gpu.decode_trellis(*stored, settings, height * width, 0, n_chunks, x.dtype)
        return torch.nn.functional.linear(x, weights.view(height, width))

    by_torch = _dense_layer(height, width, max(2, -(-_COLD // (2 * height * width))))
    return [_compare(height, width, n, packed, by_torch) for n in (1, 512)]


def _layer_rows(height: int, width: int, bits: int) -> list[Row]:
    levels = torch.from_numpy(normal_levels(bits)).view(torch.int32).to("cuda")
    signs, n_blocks = sign_words(sign_vector()), height * width // 128
    sets = max(2, -(-_COLD // (n_blocks * 16 * bits)))
    codes = [torch.randint(256, (n_blocks, 16 * bits), dtype=torch.uint8, device="cuda") for _ in range(sets)]
    scales = [(torch.rand(n_blocks, device="cuda") * 0.01).half().view(torch.int16) for _ in range(sets)]
    by_torch = _dense_layer(height, width, min(sets, 8))

    def fused(i: int, x: torch.Tensor) -> torch.Tensor:
        rotated = packed_gpu.rotate(x, signs)
        return packed_gpu.multiply(rotated, codes[i % sets], scales[i % sets], levels, 0, None, x.dtype)

    def decoded(i: int, x: torch.Tensor) -> torch.Tensor:
        weights = packed_gpu.decode(codes[i % sets], scales[i % sets], levels, signs, 0, x.dtype)
        return torch.nn.functional.linear(x, weights.view(height, width))

    return [_compare(height, width, n, fused if n <= 16 else decoded, by_torch) for n in (1, 2, 4, 8, 16, 512)]


def _dense_layer(height: int, width: int, sets: int) -> Layer:
    dense = [torch.randn((height, width), device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    return lambda i, x: torch.nn.functional.linear(x, dense[i % sets])


def _compare(height: int, width: int, n: int, packed: Layer, by_torch: Layer) -> Row:
    """A row of the table for `n` activations: layers take the number of a call and the activations."""
    x = torch.randn((n, width), device="cuda", dtype=torch.bfloat16)
    ours, theirs = (seconds_in_a_graph(partial(layer, x=x), 16) for layer in (packed, by_torch))
    return {
        "rows": height, "columns": width, "activations": n, "packed us": ours * 1e6, "bf16 us": theirs * 1e6,
        "times as fast": theirs / ours,
    }  # fmt: skip
