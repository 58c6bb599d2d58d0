"""Would more adaptation pay? Variants of the trellis at equal bits, judged by the output of an encoder.

    python scripts/adaptation.py [--bpw 3.5 4.5] [--seeds 8] [--only REGEX] [--json FILE]

The model is all-MiniLM-L6-v2. Bits are ideal (scripts/trial_coding.py), side information is counted. What quantization
does to an output depends on luck: each variant is measured with several random sign vectors, and the mean and its
standard error are printed, relative to the first line. spec/decisions/0015 holds the results.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from safetensors.torch import save_file
from trial_coding import (
    Coded,
    Encoder,
    Floats,
    Weights,
    code_model,
    entropy,
    entropy_of_bytes,
    fit_gain,
    load_weights,
    mean_squares,
    random_signs,
    rotate,
    rotate_back,
    search,
)

BLOCK = 128


@dataclass(frozen=True)
class Variant:
    """One way to spend the bits; the defaults are what the format does."""

    name: str
    row_power: float = 1  # the scale of a row is its RMS to this power
    column_power: float = 0  # columns are divided by their RMS, after rows, to this power
    classes: int = 1  # of blocks by their energy, each with frequency tables of its own
    class_power: float = 0  # the step of a block is multiplied by its class's RMS to this power
    one_table: bool = False  # for all classes
    factor: Callable[[str, float], float] = field(default=lambda name, rms: 1.0)  # of the step, by tensor and its RMS


def coarse(values: Floats) -> tuple[Floats, float]:
    """Scales as eighths of an octave, as coarse as those of the format, and their bits."""
    eighths = np.round(8 * np.log2(np.maximum(values, 1e-12))).astype(np.int64)
    return np.exp2(eighths / 8).astype(np.float32), entropy_of_bytes(eighths)


def code(variant: Variant, step: float, states: int, signs: Floats, name: str, source: Floats) -> Coded:
    """A matrix coded and decoded, and its bits."""
    weights = source.reshape(-1, source.shape[-1])
    rows = np.sqrt(mean_squares(weights))
    rms = math.sqrt(float((rows**2).mean()))
    row_scales, bits = coarse((rows / rms) ** variant.row_power)
    scales = row_scales[:, None] * np.float32(rms)
    if variant.column_power:
        columns = np.sqrt(mean_squares((weights / scales).T))
        column_scales, more = coarse(columns**variant.column_power)
        scales, bits = scales * column_scales, bits + more
    coordinates = rotate((weights / scales).reshape(-1), signs)
    energies = mean_squares(coordinates)
    edges = np.quantile(energies, np.arange(1, variant.classes) / variant.classes)
    of_block = np.searchsorted(edges, energies)
    if variant.classes > 1:
        bits += entropy_of_bytes(of_block)
    class_rms = np.array([math.sqrt(float(energies[of_block == k].mean())) for k in range(variant.classes)])
    block_steps = (step * variant.factor(name, rms) * class_rms**variant.class_power).astype(np.float32)[of_block]
    steps = coordinates / block_steps[:, None]
    indices = search(steps.reshape(-1), states).reshape(steps.shape)
    decoded = np.empty_like(coordinates)
    for k in range(variant.classes):
        mine = of_block == k if variant.classes > 1 else slice(None)
        decoded[mine] = indices[mine] * block_steps[mine, None] * np.float32(fit_gain(steps[mine], indices[mine]))
        bits += 0 if variant.one_table else entropy(indices[mine])
    bits += entropy(indices) if variant.one_table else 0
    restored = rotate_back(decoded, signs, weights.size).reshape(weights.shape) * scales
    return restored.reshape(source.shape), bits


def try_variant(
    variant: Variant, weights: Weights, names: list[str], encoder: Encoder, bpw: float, seeds: int, states: int
) -> list[tuple[float, float, float]]:
    """(bits a weight, error of the weights, error of the output), for each sign vector, near `bpw`."""
    step, found = 3.4 * 2.0**-bpw, []
    for seed in range(-1, seeds):  # the first only finds the step
        settings = variant, step, states, random_signs(BLOCK, max(seed, 0))
        changed, bits, error = code_model(weights, names, partial(code, *settings))
        if seed >= 0:
            found.append((bits, error, encoder.error(changed)))
        step *= 2.0 ** (bits - bpw)
    return found


def write_models(variants: list[Variant], model_dir: Path, pattern: str, bpw: float, states: int, out: Path) -> None:
    """For each variant a copy of the model with the matrices that it decodes to, rounded to their dtype."""
    weights, names = load_weights(model_dir)
    names = [name for name in names if re.search(pattern, name)]
    for variant in variants:
        step, signs = 3.4 * 2.0**-bpw, random_signs(BLOCK, 0)
        for _ in range(2):
            changed, bits, error = code_model(weights, names, partial(code, variant, step, states, signs))
            step *= 2.0 ** (bits - bpw)
        folder = out / re.sub(r"\W+", "-", variant.name)
        shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        rounded = {name: weight.to(weights[name].dtype).contiguous() for name, weight in changed.items()}
        save_file(rounded, folder / "model.safetensors", {"format": "pt"})
        print(f"{folder}: {bits:.3f} bits a weight, error of weights {error:.6f}", flush=True)


def kind(name: str) -> str:
    """embeddings, attention or mlp."""
    return "embeddings" if "embeddings" in name else "attention" if ".attention." in name else "mlp"


def by_kind(**factors: float) -> Callable[[str, float], float]:
    """Steps of the tensors of a kind times a factor."""
    return lambda name, rms: factors.get(kind(name), 1.0)


def by_layer(factors: dict[int, float]) -> Callable[[str, float], float]:
    """Steps of the tensors of a layer of six times a factor."""

    def factor(name: str, rms: float) -> float:
        match = re.search(r"layer\.(\d+)\.", name)
        return factors.get(int(match[1]), 1.0) if match else 1.0

    return factor


def by_rms(power: float) -> Callable[[str, float], float]:
    """Relative steps smaller for tensors of large weights: 0 is an equal relative error, 1 an equal absolute one."""
    return lambda name, rms: (0.05 / rms) ** power


FINER = 2.0**-0.25  # a quarter of a bit more
VARIANTS = (
    Variant("as it is: one scale a row"),
    Variant("one scale a tensor", row_power=0),
    *(Variant(f"row scale to the power of {power:g}", row_power=power) for power in (0.25, 0.5, 0.75, 1.25)),
    *(Variant(f"column scales to the power of {power:g}", column_power=power) for power in (-0.5, 0.25, 0.5, 0.75, 1)),
    Variant("columns to the power of 0.5, rows to 0.5", row_power=0.5, column_power=0.5),
    Variant("columns to the power of 0.5, rows to 0", row_power=0, column_power=0.5),
    *(Variant(f"{n} classes of blocks, steps by class", classes=n, class_power=1, one_table=True) for n in (2, 4)),
    *(Variant(f"{n} classes of blocks, tables by class", classes=n) for n in (2, 4)),
    Variant("4 classes of blocks, both, half way", classes=4, class_power=0.5),
    Variant("one scale a tensor, 4 classes, tables by class", row_power=0, classes=4),
    *(Variant(f"steps by a tensor's RMS to the power of {p:g}", factor=by_rms(p)) for p in (-0.25, 0.25, 0.5)),
    Variant("attention finer", factor=by_kind(attention=FINER)),
    Variant("mlp finer", factor=by_kind(mlp=FINER)),
    Variant("embeddings finer", factor=by_kind(embeddings=FINER)),
    Variant("embeddings coarser", factor=by_kind(embeddings=1 / FINER)),
    Variant("first layer finer", factor=by_layer({0: FINER})),
    Variant("last layer finer", factor=by_layer({5: FINER})),
    Variant("first and last layer finer", factor=by_layer({0: FINER, 5: FINER})),
    Variant("from fine to coarse by depth", factor=by_layer({i: 2 ** (0.1 * (i - 2.5)) for i in range(6)})),
    Variant("from coarse to fine by depth", factor=by_layer({i: 2 ** (0.1 * (2.5 - i)) for i in range(6)})),
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bpw", type=float, nargs="+", default=[3.5, 4.5])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--tensors", default="", metavar="REGEX", help="which to code; the others stay as they are")
    parser.add_argument("--only", default="", metavar="REGEX", help="only these variants, and the first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, nargs=2, metavar=("MODEL_DIR", "FOLDER"),
                        help="write what a model decodes to, for hlwq-eval, instead of measuring")  # fmt: skip
    options = parser.parse_args()
    chosen = [v for i, v in enumerate(VARIANTS) if i == 0 or re.search(options.only, v.name)]
    if options.write:
        write_models(chosen, options.write[0], options.tensors, options.bpw[0], options.states, options.write[1])
        return
    script = Path(__file__).with_name("minilm.py")
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    weights, names = load_weights(Path(made.stdout.strip()))
    names = [name for name in names if re.search(options.tensors, name)]
    encoder = Encoder(Path(made.stdout.strip()))
    rows: list[dict[str, object]] = []
    for bpw in options.bpw:
        print(f"\n| {bpw:g} bits a weight | error of weights | of the output | relative | +- |\n|---|---|---|---|---|")
        base = 0.0
        for variant in chosen:
            found = try_variant(variant, weights, names, encoder, bpw, options.seeds, options.states)
            # what is left of a difference in size, at 6.02 dB a bit
            errors, outputs = ([row[i] * 4 ** (row[0] - bpw) for row in found] for i in (1, 2))
            output, spread = mean(outputs), stdev(outputs) / math.sqrt(len(outputs))
            base = base or output
            print(f"| {variant.name} | {mean(errors):.6f} | {output:.5f} | {output / base:.3f} | {spread / base:.3f} |",
                  flush=True)  # fmt: skip
            rows.append({"variant": variant.name, "bpw": bpw, "found": found})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
