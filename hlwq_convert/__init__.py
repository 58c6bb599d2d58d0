"""hlwq: quantize a Hugging Face model into one .hlwq file, look inside it, and load it back.

import hlwq_convert as h

h.convert("model-dir", "out.hlwq", bits=5)
h.inspect("out.hlwq").bpw
state_dict = h.load_state_dict("out.hlwq")  # needs torch
model, tokenizer = h.load_model("out.hlwq")  # needs transformers too
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hlwq_formats.errors import HlwqError as HlwqError

    from .conversion import convert as convert
    from .conversion import convert_ladder as convert_ladder
    from .inspection import inspect as inspect
    from .open_file import OpenFile as open  # noqa: F401, N813
    from .runtime.kv_cache import QuantizedCache as QuantizedCache
    from .runtime.load import iter_tensors as iter_tensors
    from .runtime.load import load_state_dict as load_state_dict
    from .runtime.model import load_model as load_model

_LAZY = {
    "convert": "conversion.convert",
    "convert_ladder": "conversion.convert_ladder",
    "inspect": "inspection.inspect",
    "open": "open_file.OpenFile",
    "load_state_dict": "runtime.load.load_state_dict",
    "iter_tensors": "runtime.load.iter_tensors",
    "load_model": "runtime.model.load_model",
    "QuantizedCache": "runtime.kv_cache.QuantizedCache",
    "HlwqError": "hlwq_formats.errors.HlwqError",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    """Import what is asked for, and only then: `--help` needs no NumPy, and nothing but loading needs torch."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _LAZY[name].rpartition(".")
    value = getattr(import_module(module if module.startswith("hlwq_formats") else f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
