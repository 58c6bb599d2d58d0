"""Load time and peak memory: load_model against transformers loading the bf16 directory and a GGUF of the same model.

    python scripts/benchmark_load.py FOLDER

FOLDER gets SmolLM2-135M-Instruct as a .hlwq file at 5 bits and as the Q4_1 GGUF that scripts/smollm2.py unpacks its
bf16 directory from. Every way is one process of its own: it imports what it needs, loads, and computes the logits of
one short prompt; the second of two runs counts, so that files are cached and kernels compiled. Needs the extras dev
and accelerate (transformers wants it for GGUF). Linux.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import smollm2

WAYS = ("hlwq dense", "hlwq packed", "transformers bf16", "transformers GGUF")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def measure(way: str, folder: Path) -> None:
    """Load in this process and print the figures as JSON."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    import hlwq_convert as h

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    load_model = h.load_model  # imports all that loading needs
    source = smollm2.make(folder)
    before = resident("VmRSS")
    _CLEAR.write_text("5")  # makes the present size the highest so far
    began = time.perf_counter()
    if way == "transformers bf16":
        model = AutoModelForCausalLM.from_pretrained(source)
    elif way == "transformers GGUF":
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    else:
        model, _ = load_model(folder / "model.hlwq", weights="packed" if way == "hlwq packed" else "dense")
    seconds = time.perf_counter() - began
    after = resident("VmRSS") - before
    began = time.perf_counter()
    with torch.no_grad():
        model(torch.arange(100, 132)[None])
    prompt = time.perf_counter() - began
    peak = resident("VmHWM") - before  # what is mapped and not read, as safetensors are, counts only when it is used
    print(json.dumps({"seconds": seconds, "peak": peak, "after": after, "prompt": prompt}))


def main() -> None:
    """Prepare, measure each way in processes of its own, print the table."""
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        measure(sys.argv[2], folder)
        return
    import hlwq_convert as h

    source = smollm2.make(folder)
    if not (folder / "model.gguf").exists():
        smollm2.fetch_gguf(folder)
    h.convert(source, folder / "model.hlwq", overwrite=True)
    stored = {
        "hlwq": (folder / "model.hlwq").stat().st_size,
        "transformers bf16": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "transformers GGUF": (folder / "model.gguf").stat().st_size,
    }
    print(f"torch threads: {os.environ.get('OMP_NUM_THREADS', 'all')}")
    print("| | file, MB | load, s | memory after loading, MB | peak, prompt included, MB | prompt of 32 tokens, s |")
    print("|---|---|---|---|---|---|")
    for way in WAYS:
        command = [sys.executable, __file__, str(folder), way]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
        found = json.loads(runs[1].splitlines()[-1])
        size = stored.get(way, stored["hlwq"]) / 1e6
        figures = f"{found['seconds']:.2f} | {found['after']:.0f} | {found['peak']:.0f} | {found['prompt']:.2f}"
        print(f"| {way} | {size:.0f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
