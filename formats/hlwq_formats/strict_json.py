"""JSON from strangers: size and structure are bounded before parsing, duplicate keys are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NoReturn

from .errors import HlwqError, escape

# what 200,000 tensors need, and some more
_MAX_COUNT = {b",": 2_500_000, b":": 1_000_000, b"[": 700_000, b"{": 400_000}


def parse(document: bytes, fail: Callable[[str], HlwqError]) -> object:
    """Parse a UTF-8 JSON document; whatever is wrong with it is raised as `fail(problem)`.

    Counting punctuation first keeps a hostile document from growing into 20 times its size.
    """
    if any(document.count(mark) > most for mark, most in _MAX_COUNT.items()):
        raise fail("the JSON has more elements than any real one")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _Refused(f'key "{escape(twice, 120)}" appears twice')
        return result

    def no_constant(name: str) -> NoReturn:
        raise _Refused(f"{name} is not JSON")

    def integer(text: str) -> int:
        if text == "-0":  # Python takes it for 0, other readers for a float or for an error
            raise _Refused("-0 is not an integer")
        return int(text)

    parse_int = integer if b"-0" in document else None  # a call for each number is slow
    try:
        return json.loads(
            document.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant, parse_int=parse_int
        )
    except _Refused as error:
        raise fail(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise fail(f"not valid JSON: {escape(str(error))}") from None


class _Refused(ValueError):
    pass
