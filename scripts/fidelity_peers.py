"""Other quantizers for scripts/fidelity: each codes the matrices of a model in memory, as its own package does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import torch

Weights = dict[str, torch.Tensor]
Restored = tuple[Weights, int]
"""What the matrices decode to, and the bytes that they are stored in."""

_MOST_FOR_NNCODEC = 100_000_000  # weights: it codes three million a second, one after another


@dataclass(frozen=True)
class Peer:
    """A quantizer: from matrices in float32, all of a model."""

    name: str
    package: str  # that has to be there
    quantize: Callable[[Weights], Restored]
    most: float = float("inf")  # weights


def why_not(peer: Peer, weights: int) -> str | None:
    """What keeps a peer from being measured, or None."""
    if find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    return f"too slow for {weights:,} weights" if weights > peer.most else None


def _gguf(kind: str, matrices: Weights) -> Restored:
    import gguf

    number, size, restored = gguf.GGMLQuantizationType[kind], 0, {}
    for name, weight in matrices.items():
        coded = gguf.quants.quantize(weight.numpy(), number)
        size += coded.nbytes
        restored[name] = torch.from_numpy(gguf.quants.dequantize(coded, number))
    return restored, size


def _nf4(matrices: Weights) -> Restored:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    size, restored = 0, {}
    for name, weight in matrices.items():
        coded, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        size += coded.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        restored[name] = dequantize_4bit(coded, state)
    return restored, size


def _hqq(bits: int, matrices: Weights) -> Restored:
    from hqq.core.quantize import Quantizer

    size, restored = 0, {}
    for name, weight in matrices.items():
        coded, meta = Quantizer.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu")
        meta |= {key: meta[key].half() for key in ("scale", "zero")}  # as its linear layer keeps them
        size += coded.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
        restored[name] = Quantizer.dequantize(coded, meta).float()
    return restored, size


def _nncodec(qp: int, matrices: Weights) -> Restored:
    if "nncodec.framework" not in sys.modules:
        # readers of model files and training: they need torchvision and more, and are not used to code arrays
        stand_in = ModuleType("nncodec.framework")
        stand_in.tensorflow_model = stand_in.pytorch_model = stand_in.use_case_init = None  # type: ignore[attr-defined]
        sys.modules["nncodec.framework"] = stand_in
    from nncodec import nnc

    arrays = {name: weight.numpy().copy() for name, weight in matrices.items()}
    stream = nnc.compress(arrays, qp=qp, use_dq=True, bitstream_path=None, return_bitstream=True)
    restored = nnc.decompress(stream, verbose=False)
    return {name: torch.from_numpy(restored[name]) for name in matrices}, len(stream)


PEERS = (
    *(Peer(f"gguf-py {kind}", "gguf", partial(_gguf, kind)) for kind in ("Q4_0", "Q5_0", "Q8_0")),
    Peer("bitsandbytes NF4, double", "bitsandbytes", _nf4),
    *(Peer(f"HQQ {bits} bits, groups of 64", "hqq", partial(_hqq, bits)) for bits in (3, 4)),
    *(Peer(f"nncodec, qp {qp}", "nncodec", partial(_nncodec, qp), _MOST_FOR_NNCODEC) for qp in (-20, -24, -28, -32)),
)
