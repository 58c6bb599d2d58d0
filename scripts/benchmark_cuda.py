"""The GPU against its own memory and its bus: kernels, loading and converting as ratios to copies of the same bytes.

    scripts/bench --device cuda [--weights N] [--model-weights N] [--json FILE]

Each ratio is a rate over the rate of a copy in the same run: a copy on the device for the kernels (bytes read plus
bytes written), a copy from host memory for loading, and reading plus writing on the host for converting.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from benchmark_gpu_parts import layer_rows, trellis_layer_rows, trellis_rows
from benchmark_model import MIN_WEIGHTS, qwen_shapes, write_model
from benchmark_report import number, table
from benchmark_timing import Copies, Row, measure_kernel

import hlwq_convert as h
from hlwq_convert.cli.memory import keep_freed_memory
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.parallel import default_workers
from hlwq_convert.quantize import ScalarCode, choose_exponent
from hlwq_convert.rotate import sign_vector
from hlwq_convert.runtime.gpu import find_devices
from hlwq_convert.runtime.launch import OWN, DeviceCode, DeviceEncoder


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, for the command line or a test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=1 << 30, help="weights for the kernels; default 2**30")
    parser.add_argument("--model-weights", type=int, default=8_000_000_000, help="of the synthetic model; 0: none")
    parser.add_argument("--model-dir", type=Path, help="convert and load this model instead of a synthetic one")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"), help="a folder in memory; default /dev/shm")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args(arguments)


def kernel_rows(weights: int) -> list[Row]:
    """Decoding and encoding of one large tensor that lies in the memory of the GPU."""
    device = torch.device("cuda", 0)
    n_blocks = weights // 128
    copies = Copies(4 * weights)
    items = (torch.randn(weights, device=device) * 0.02).to(torch.bfloat16)
    exponent = choose_exponent(float(items.abs().max()))
    rows = []
    for bits in (2, 4, 5, 8):
        efforts = ("fast", "default") if bits == 5 else ("default",)
        for effort in efforts:
            code = ScalarCode("BF16", bits, exponent, normal_levels(bits), sign_vector(), effort)
            encoder = DeviceEncoder(code, device)
            result = torch.empty(encoder.result_bytes(n_blocks), dtype=torch.uint8, device=device)
            parts = encoder.parts(n_blocks, result)
            rows.append(
                measure_kernel(
                    f"encode {bits} bits, {effort}", copies, weights, 2 * weights + len(result),
                    lambda encoder=encoder, parts=parts: encoder.encode(items.view(torch.int32), parts),
                )
            )  # fmt: skip
        packed, scales = parts.packed, parts.scales
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


# --- a whole model -----------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call, all that it began on the GPU included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def read_all(folder: Path) -> int:
    """Read the weights of a model, 16 MiB at a time, and return their bytes."""
    buffer, total = bytearray(16 << 20), 0
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def write_bytes(path: Path, size: int) -> None:
    """Write that many bytes, 16 MiB at a time."""
    block = os.urandom(16 << 20)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: min(len(block), size - start)])
    path.unlink()


def model_rows(model_dir: Path, work: Path) -> list[Row]:
    """Converting a model in memory, and loading the file that comes of it, against copies of the same bytes."""
    tiny = write_model(work / "tiny", qwen_shapes(MIN_WEIGHTS))
    warm_up = timed(lambda: h.convert(tiny, work / "tiny.hlwq", device="cuda"))
    warm_up += timed(lambda: h.load_state_dict(work / "tiny.hlwq", device="cuda"))
    out = work / "model.hlwq"
    rows: list[Row] = []
    for device in ("cuda", "cpu"):
        out.unlink(missing_ok=True)
        convert = timed(lambda device=device: h.convert(model_dir, out, device=device))
        size = out.stat().st_size
        read, write = timed(lambda: read_all(model_dir)), timed(lambda size=size: write_bytes(work / "copy", size))
        rows.append(
            {
                "what": f"convert on {device}",
                "s": convert,
                "floor": "read and write on one core",
                "floor s": read + write,
            }
        )
    floors = {}
    for name, pinned in (("pageable", False), ("pinned", True)):
        piece = torch.empty(min(1 << 30, size), dtype=torch.uint8, pin_memory=pinned)
        piece.random_()
        target = torch.empty_like(piece, device="cuda")
        target.copy_(piece)
        floors[name] = timed(lambda piece=piece, target=target: target.copy_(piece)) * size / len(piece)
    load = min(timed(lambda: h.load_state_dict(out, device="cuda")) for _ in range(3))
    rows += [{"what": "load", "s": load, "floor": f"{name} copy", "floor s": floor} for name, floor in floors.items()]
    for row in rows:
        row |= {"times": row["s"] / row["floor s"], "GB": size / 1e9, "warm-up s": warm_up}
    return rows


def main() -> None:
    """Measure, print, and write the JSON file that was asked for."""
    options = read_options()
    find_devices("cuda")
    keep_freed_memory()  # as hlwq-convert does
    about = {"gpu": torch.cuda.get_device_name(0), "cpus": default_workers(), "torch": torch.__version__}
    about |= {"triton": triton.__version__, "weights": options.weights, "model_weights": options.model_weights}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    document: dict[str, object] = {"about": about, "kernels": kernel_rows(options.weights)}
    torch.cuda.empty_cache()
    document["kernels"] += trellis_rows(options.weights)
    show("Kernels on one tensor in the memory of the GPU", document["kernels"])
    torch.cuda.empty_cache()
    document["layers"] = layer_rows()
    show("A layer of packed weights, 5 bits, against torch's in bfloat16", document["layers"])
    torch.cuda.empty_cache()
    document["trellis layers"] = trellis_layer_rows()
    show("A layer of a packed trellis, 4.25 bits, against torch's in bfloat16", document["trellis layers"])
    torch.cuda.empty_cache()
    if options.model_dir or options.model_weights:
        with tempfile.TemporaryDirectory(prefix="hlwq-bench-", dir=options.work) as folder:
            model_dir = options.model_dir or write_model(Path(folder) / "source", qwen_shapes(options.model_weights))
            document["model"] = model_rows(model_dir, Path(folder))
        show("A whole model, host memory to GPU or back", document["model"])
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def show(title: str, rows: list[Row]) -> None:
    """Print rows with the same keys as a table."""
    cells = [[value if isinstance(value, str) else number(value, 2) for value in row.values()] for row in rows]
    print(table(title, list(rows[0]), cells))


if __name__ == "__main__":
    main()
