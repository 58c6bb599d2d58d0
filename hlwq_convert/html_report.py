"""An inspection as one self-contained page: charts, heat maps and a table, drawn in the browser from JSON.

The page asks the network for nothing, and its Content-Security-Policy lets it run only its own script. Texts of the
file are escaped twice over: made printable as in a terminal, then put where no markup can be read from them.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

import msgspec

from .histograms import Histogram
from .inspection import Inspection
from .page_data import page_data

_SCRIPTS = ("page.js", "maps.js", "histogram.js", "table.js", "start.js")
"""One script in parts, in this order."""


def make_page(inspection: Inspection, histograms: list[Histogram]) -> bytes:
    """The page, in UTF-8; the same bytes for the same arguments."""
    style, script = _read("page.css"), "\n".join(map(_read, _SCRIPTS))
    policy = (
        f"default-src 'none'; style-src '{_csp_hash(style)}'; script-src '{_csp_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    filled = {"policy": policy, "style": style, "script": script, "data": _as_json(inspection, histograms)}
    before, *rest = _read("page.html").split("{{")  # one pass: what is filled in is not looked at again
    for piece in rest:
        name, after = piece.split("}}", 1)
        before += filled[name] + after
    return before.encode()


def _read(name: str) -> str:
    return (resources.files("hlwq_convert") / "page" / name).read_text("utf-8")


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _as_json(inspection: Inspection, histograms: list[Histogram]) -> str:
    """JSON without a character that could end the element it stands in."""
    document = msgspec.json.encode(page_data(inspection, histograms)).decode()
    for char in "<>&":
        document = document.replace(char, f"\\u{ord(char):04x}")
    return document
