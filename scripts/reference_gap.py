"""How close the divergence of hlwq-eval, from the most likely tokens and samples of the others, is to the exact one.

python scripts/reference_gap.py MODEL_DIR FILE.hlwq [--ctx 256] [--windows 2]
"""

from __future__ import annotations

import argparse

import torch

from hlwq_convert.evaluation.reference import SAMPLES, TOP_K
from hlwq_convert.evaluation.windows import cut_windows, read_text
from hlwq_convert.runtime.causal_model import file_model, hush, load_tokenizer, source_model
from hlwq_convert.runtime.scoring import first_token, score, source_reference
from hlwq_convert.source import open_source


def main() -> None:
    """Print a Markdown table: what is kept of a prediction, mean divergence, share of the exact one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir")
    parser.add_argument("file")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()

    hush()
    cpu = torch.device("cpu")
    source = open_source(options.model_dir)
    tokenizer = load_tokenizer(source)
    tokens = tokenizer(read_text(None), add_special_tokens=False, verbose=False).input_ids
    windows = cut_windows(tokens, first_token(tokenizer), options.ctx, options.windows)
    kept = [(TOP_K, 0), (2 * TOP_K, 0), (TOP_K, SAMPLES), (len(tokenizer), 0)]
    model = source_model(source, torch.float32, cpu)
    references = [source_reference(model, windows, lambda done, total: None, *sizes) for sizes in kept]
    del model
    model = file_model(options.file, source, torch.float32, cpu)
    found = [score(model, windows, reference, lambda done, total: None).kl.mean() for reference in references]
    print("| most likely | samples of the others | their probability | mean KL | of the exact one |")
    print("|---:|---:|---:|---:|---:|")
    for (top_k, samples), reference, kl in zip(kept, references, found, strict=True):
        print(f"| {top_k:,} | {samples} | {100 * reference.rest:.2g} % | {kl:.6f} | {kl / found[-1]:.4f} |")


if __name__ == "__main__":
    main()
