"""Load time and peak memory: load_model against transformers loading the bf16 directory and a GGUF of the same model.

    python scripts/benchmark_load.py FOLDER

FOLDER gets SmolLM2-135M-Instruct as .hlwq files at 5 bits and at a variable rate of 4.25 bits, and as the Q4_1 GGUF
that scripts/smollm2.py unpacks its bf16 directory from. Every way is one process of its own: it imports what it needs,
loads, and continues one short prompt; the second of two runs counts, so that files are cached and kernels compiled.
Seconds are the CPU's, all threads together: on one core, what they are on the clock of a machine that does nothing
else. Needs the extras dev and accelerate (transformers wants it for GGUF). Linux.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import smollm2

WAYS = (
    "5 bits, dense",
    "5 bits, packed",
    "4.25 bits, dense",
    "4.25 bits, packed",
    "transformers bf16",
    "transformers GGUF",
)
FILES = {"5 bits": {"bits": 5}, "4.25 bits": {"bpw": 4.25}}
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
    began = time.process_time()
    if way == "transformers bf16":
        model = AutoModelForCausalLM.from_pretrained(source)
    elif way == "transformers GGUF":
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.bfloat16)
    else:
        rate, weights = way.split(", ")
        model, _ = load_model(folder / f"{rate}.hlwq", weights=weights)  # type: ignore[arg-type]
    seconds = time.process_time() - began
    after = resident("VmRSS") - before
    cache, times = transformers.DynamicCache(config=model.config), []
    with torch.no_grad():
        for count in (32, *[1] * 16):
            began = time.process_time()
            model(torch.arange(100, 100 + count)[None], cache=cache)
            times.append(time.process_time() - began)
    peak = resident("VmHWM") - before  # what is mapped and not read, as safetensors are, counts only when it is used
    held = {id(tensor): tensor.nbytes / 1e6 for tensor in (*model.parameters(), *model.buffers())}
    found = {"seconds": seconds, "held": sum(held.values()), "peak": peak, "after": after}
    print(json.dumps(found | {"prompt": times[0], "token": median(times[1:])}))


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
    for rate, options in FILES.items():
        if not (folder / f"{rate}.hlwq").exists():
            h.convert(source, folder / f"{rate}.hlwq", **options)  # type: ignore[arg-type]
    stored = {
        **{rate: (folder / f"{rate}.hlwq").stat().st_size for rate in FILES},
        "transformers bf16": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "transformers GGUF": (folder / "model.gguf").stat().st_size,
    }
    print(f"torch threads: {os.environ.get('OMP_NUM_THREADS', 'all')}")
    print(
        "| | file, MB | weights, MB | resident, MB | at most, MB | load, CPU s | prompt of 32, CPU s | a token, CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for way in WAYS:
        command = [sys.executable, __file__, str(folder), way]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
        found = json.loads(runs[1].splitlines()[-1])
        size = stored[way.split(",")[0]] / 1e6
        memory = f"{found['held']:.1f} | {found['after']:.0f} | {found['peak']:.0f}"
        figures = f"{memory} | {found['seconds']:.2f} | {found['prompt']:.2f} | {found['token']:.3f}"
        print(f"| {way} | {size:.0f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
