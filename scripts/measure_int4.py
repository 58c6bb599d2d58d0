"""What int4 costs: from the source, from a file, and the file left packed, against the source in float32.

    python scripts/measure_int4.py MODEL_DIR FILE.hlwq

Prints the relative squared error of an encoder's last hidden states on lines of the README. Needs torchao.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import hlwq_convert as h
from hlwq_convert.runtime.int4 import can_be_int4, int4_config, to_int4


def main() -> None:
    """Measure and print."""
    source, file = sys.argv[1:3]
    lines = (Path(__file__).parents[1] / "README.md").read_text().split("\n")
    texts = [line for line in lines if len(line) > 60][:24]
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
    mask = inputs["attention_mask"].bool()

    def hidden(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).last_hidden_state[mask].double()

    exact = hidden(AutoModel.from_pretrained(source).eval())
    int4 = AutoModel.from_pretrained(source).eval()
    config = int4_config(torch.device("cpu"), torch.float32)
    layers = [module for module in int4.modules() if can_be_int4(module)]
    for module in layers:
        to_int4(module, config)
    print(f"{len(layers)} layers")
    models = {
        "packed": h.load_model(file, weights="packed")[0],
        "int4 from the file": h.load_model(file, weights="int4")[0],
        "int4 from the source": int4,
    }
    for name, model in models.items():
        found = hidden(model)
        print(f"{name}: {float((found - exact).square().sum() / exact.square().sum()):.4f}")


if __name__ == "__main__":
    main()
