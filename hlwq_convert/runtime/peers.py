"""Other quantizers applied to the same source, weights only, in memory.

Each is used as its own users get it by default: the linear layers at 4 bits, the embeddings and the output layer as
they are. Layers are quantized and dequantized by the other project's code, so no kernel of it needs to run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hlwq_formats.dtypes import ITEM_BITS

from ..source import Source
from .load import TORCH

_GROUP = 64
"""Weights that share a scale: the default of bitsandbytes and HQQ, and a size that divides most rows."""


@dataclass(frozen=True)
class Peer:
    """A quantizer: from a weight of the source's dtype to what its users compute with, and the bits it stores."""

    name: str
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, int]]


def _nf4(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=_GROUP, quant_type="nf4")
    return functional.dequantize_4bit(packed, state), _bits(packed, state.absmax)


def _torchao_int4(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    from torchao.quantization import utils

    weight = weight.to(torch.bfloat16)  # the only dtype of its int4 kernels
    scales, zeros = utils.get_groupwise_affine_qparams(weight, 4, _GROUP, torch.bfloat16)
    codes = utils.groupwise_affine_quantize_tensor_from_qparams(weight, scales, zeros, 4, _GROUP)
    restored = utils.groupwise_affine_dequantize_tensor_from_qparams(codes, scales, zeros, 4, _GROUP)
    return restored, 4 * weight.numel() + _bits(scales, zeros)


def _hqq(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(weight, nbits=4, group_size=_GROUP, axis=1, device=str(weight.device))
    meta |= {key: meta[key].half() for key in ("scale", "zero")}  # as its linear layer keeps them
    return Quantizer.dequantize(packed, meta), _bits(packed, meta["scale"], meta["zero"])


PEERS = (
    Peer("bitsandbytes NF4", _nf4),
    Peer("torchao int4, groups of 64", _torchao_int4),
    Peer("HQQ 4 bits, groups of 64", _hqq),
)


@torch.no_grad()
def apply_peer(peer: Peer, model: Any, source: Source) -> tuple[int, float]:
    """Quantize the linear layers of a model in place: (bytes, bits a weight) of the whole model so stored.

    A layer whose rows do not consist of whole groups stays as it is. Raises what the peer raises, ImportError when
    it is not installed.
    """
    dtypes = {tensor.name: tensor.dtype for tensor in source.tensors}
    bits, weights = sum(8 * t.length for t in source.tensors), sum(t.numel for t in source.tensors)
    for name, layer in model.named_modules():
        tag = dtypes.get(f"{name}.weight")
        if not isinstance(layer, torch.nn.Linear) or tag is None or layer is model.get_output_embeddings():
            continue
        if layer.in_features % _GROUP:
            continue
        restored, stored = peer.quantize(layer.weight.to(TORCH[tag]))
        layer.weight.copy_(restored.to(TORCH[tag]))
        bits += stored - ITEM_BITS[tag] * layer.weight.numel()
    return -(-bits // 8), bits / weights


def _bits(*tensors: torch.Tensor) -> int:
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
