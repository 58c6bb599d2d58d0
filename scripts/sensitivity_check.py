"""Does spending bits by measured sensitivity lower the divergence at equal size?

    python scripts/sensitivity_check.py compare MODEL_DIR PLAIN.hlwq WEIGHTED.hlwq [--text FILE] [--ctx 512]
    python scripts/sensitivity_check.py recipe SENSITIVITY.json MODEL_DIR --bits 5 > recipe.toml

`compare` measures two files of about one size; give it a text that the sensitivities were not measured on. `recipe`
rounds the widths that the sensitivities ask for to whole bits, 2 to 8, so that the mean over these tensors is at most
--bits: a test with scalar codes, which cannot follow fractions of a bit as the trellis can.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys

from hlwq_convert.source import open_source


def main() -> None:
    """Do what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare")
    for name in ("model_dir", "plain", "weighted"):
        compare.add_argument(name)
    compare.add_argument("--text")
    compare.add_argument("--ctx", default="512")
    compare.add_argument("--windows", default="16")
    recipe = commands.add_parser("recipe")
    recipe.add_argument("sensitivity")
    recipe.add_argument("model_dir")
    recipe.add_argument("--bits", type=int, default=5)
    options = parser.parse_args()
    if options.command == "compare":
        _compare(options)
    else:
        _recipe(options)


def _compare(options: argparse.Namespace) -> None:
    arguments = [options.plain, options.weighted, "--against", options.model_dir, "--json"]
    arguments += ["--ctx", options.ctx, "--windows", options.windows]
    arguments += ["--text", options.text] if options.text else []
    code = "from hlwq_convert.cli.eval import main; main()"
    result = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, check=True)
    plain, weighted = json.loads(result.stdout)["entries"][1:]
    for entry in (plain, weighted):
        q, interval = entry["quality"], entry["quality"]["kl_interval"]
        print(
            f"{entry['name']}: {entry['bytes']:,} bytes, {entry['bpw']:.3f} bpw, KL {q['kl_mean']:.4g} "
            f"({interval['low']:.4g} to {interval['high']:.4g}), perplexity x {q['perplexity_ratio']:.4f}"
        )
    ratio = weighted["quality"]["kl_mean"] / plain["quality"]["kl_mean"]
    print(f"size x {weighted['bytes'] / plain['bytes']:.4f}, KL x {ratio:.3f}")


def _recipe(options: argparse.Namespace) -> None:
    with open(options.sensitivity, encoding="utf-8") as file:
        weights = json.load(file)["tensors"]
    counts = {t.name: t.numel for t in open_source(options.model_dir).tensors}

    def widths(shift: float) -> dict[str, int]:
        return {name: min(max(round(options.bits + shift + math.log2(s) / 2), 2), 8) for name, s in weights.items()}

    shift = 0.0  # rounding and the limits move the mean: lower all until it fits
    total = options.bits * sum(counts[name] for name in weights)
    while sum(counts[name] * bits for name, bits in widths(shift).items()) > total:
        shift -= 0.005
    print(f"default = {options.bits}")
    for name, bits in widths(shift).items():
        print(f"\n[[rule]]\nmatch = '^{re.escape(name)}$'\nbits = {bits}")


if __name__ == "__main__":
    main()
