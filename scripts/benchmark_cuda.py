"""The GPU against its own memory and its bus: kernels, loading and converting as ratios to copies of the same bytes.

    scripts/bench --device cuda [--weights N] [--convert-weights N] [--json FILE]

Each ratio is a rate over the rate of a copy in the same run: a copy on the device for the kernels (bytes read plus
bytes written), a copy from host memory for loading, and reading plus writing on the host for converting.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.quantize import ScalarCode, choose_exponent
from hlwq_convert.rotate import sign_vector
from hlwq_convert.runtime.launch import OWN, DeviceCode, DeviceEncoder

ROUNDS = 20
Row = dict[str, object]


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=1 << 30, help="weights for the kernels; default 2**30")
    parser.add_argument("--load-weights", type=int, default=8_000_000_000, help="of the model that is loaded; 0: none")
    parser.add_argument("--convert-weights", type=int, default=8_000_000_000, help="of the one converted; 0: none")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"), help="a folder in memory; default /dev/shm")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args(arguments)


def seconds_on_device(work: Callable[[], object]) -> float:
    """The median time of one call, by events on the stream; two calls go before."""
    for _ in range(2):
        work()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


class Copies:
    """Copies on the device of some total of bytes read plus bytes written."""

    def __init__(self, largest: int) -> None:
        self._from = torch.randint(256, (largest // 2,), dtype=torch.uint8, device="cuda")
        self._to = torch.empty_like(self._from)

    def seconds(self, moved: int) -> float:
        """The median time of a copy that reads and writes half of `moved` each."""
        half = moved // 2
        return seconds_on_device(lambda: self._to[:half].copy_(self._from[:half]))


def measure_kernel(name: str, copies: Copies, weights: int, moved: int, work: Callable[[], object]) -> Row:
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    first, seconds, copy = time.perf_counter() - began, seconds_on_device(work), copies.seconds(moved)
    print(f"{name}: {copy / seconds:.3f} of the copy, first call {first:.1f} s", file=sys.stderr)
    return {
        "kernel": name, "Gw/s": weights / seconds / 1e9, "GB/s": moved / seconds / 1e9,
        "copy GB/s": moved / copy / 1e9, "of the copy": copy / seconds, "first call s": first,
    }  # fmt: skip


def kernel_rows(weights: int) -> list[Row]:
    """Decoding and encoding of one large tensor that lies in the memory of the GPU."""
    device = torch.device("cuda", 0)
    n_blocks = weights // 128
    copies = Copies(4 * weights)
    items = (torch.randn(weights, device=device) * 0.02).to(torch.bfloat16)
    exponent = choose_exponent(float(items.abs().max()))
    rows = []
    for bits in range(2, 9):
        efforts = ("fast", "default") if bits in (4, 5, 8) else ("default",)
        for effort in efforts:
            code = ScalarCode("BF16", bits, exponent, normal_levels(bits), sign_vector(), effort)
            encoder = DeviceEncoder(code, device)
            result = torch.empty(encoder.result_bytes(n_blocks), dtype=torch.uint8, device=device)
            rows.append(
                measure_kernel(
                    f"encode {bits} bits, {effort}", copies, weights, 2 * weights + len(result),
                    lambda encoder=encoder, result=result: encoder.encode(items.view(torch.int32), n_blocks, result),
                )
            )  # fmt: skip
        packed = result[: n_blocks * 16 * bits].view(torch.int32)
        scales = result[-2 * n_blocks :].view(torch.float16)
        for dtype in ("BF16", "F16", "F32") if bits == 5 else ("BF16",):
            out = torch.empty(weights, dtype=OWN[dtype], device=device)
            decoder = DeviceCode(ScalarCode(dtype, bits, exponent, normal_levels(bits), sign_vector()), device)
            moved = out.nbytes + packed.nbytes + scales.nbytes
            rows.append(
                measure_kernel(
                    f"decode {bits} bits to {dtype}", copies, weights, moved,
                    lambda decoder=decoder, out=out, packed=packed, scales=scales: decoder.decode(packed, scales, out),
                )
            )  # fmt: skip
    return rows
