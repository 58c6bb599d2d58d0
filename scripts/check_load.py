"""Load a converted file into torch and compare it with its source, read by the safetensors package.

    python scripts/check_load.py MODEL_DIR FILE.hlwq [--min-cosine C] [--min-sqnr DB] [--max-bpw B]

Nothing of the comparison goes through this project's own source reader or report. Exits 1 on any difference.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

import hlwq_convert as h


def main() -> None:
    """Compare, print what was found, fail on the first thing that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--min-cosine", type=float, default=-1)
    parser.add_argument("--min-sqnr", type=float, default=-math.inf)
    parser.add_argument("--max-bpw", type=float, default=math.inf)
    options = parser.parse_args()

    source: dict[str, torch.Tensor] = {}
    for shard in sorted(options.model_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            source.update({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    began = time.monotonic()
    loaded = h.load_state_dict(options.file)
    seconds = time.monotonic() - began
    inspection = h.inspect(options.file)

    if loaded.keys() != source.keys():
        sys.exit(f"names differ: {sorted(loaded.keys() ^ source.keys())[:5]}")
    exact, cosines, sqnrs = 0, [], []
    for info in inspection.tensors:
        ours, theirs = loaded[info.name], source[info.name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            sys.exit(f"{info.name}: {ours.dtype} {ours.shape}, the source has {theirs.dtype} {theirs.shape}")
        if info.encoding not in ("scalar", "trellis"):
            if not torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)):
                sys.exit(f"{info.name}: kept raw, and not equal to the source")
            exact += 1
            continue
        x, y = theirs.double().flatten(), ours.double().flatten()
        cosines.append(float(x @ y / (x.norm() * y.norm())))
        sqnrs.append(float(20 * torch.log10(x.norm() / (x - y).norm())))
        if info.cosine is None or info.sqnr_db is None:
            sys.exit(f"{info.name}: no error is reported")
        if abs(info.cosine - cosines[-1]) > 1e-6 or abs(info.sqnr_db - sqnrs[-1]) > 1e-3:
            sys.exit(f"{info.name}: reported {info.cosine} and {info.sqnr_db} dB, found {cosines[-1]} and {sqnrs[-1]}")
    print(f"loaded {len(loaded)} tensors in {seconds:.1f} s; {exact} bit-equal to the source, {len(cosines)} quantized")
    print(f"cosine >= {min(cosines):.5f}, SQNR >= {min(sqnrs):.2f} dB, as reported; {inspection.bpw:.3f} bits a weight")
    if min(cosines) < options.min_cosine or min(sqnrs) < options.min_sqnr or (inspection.bpw or 0) > options.max_bpw:
        sys.exit(f"expected cosine >= {options.min_cosine}, SQNR >= {options.min_sqnr}, bpw <= {options.max_bpw}")


if __name__ == "__main__":
    main()
