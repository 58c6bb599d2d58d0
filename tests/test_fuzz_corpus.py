"""The targets of scripts/fuzz without a fuzzer: what it found once, and a few hundred damaged seeds for each."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import fuzz_targets  # noqa: E402
import fuzzing  # noqa: E402
from fuzz_json import plain_change  # noqa: E402
from fuzz_mutators import MUTATORS, repair_header, split  # noqa: E402

from hlwq_formats import reader  # noqa: E402
from hlwq_formats.errors import BadDigest, BadHeader, BadMetadata, HlwqError, IoFailure  # noqa: E402

CORPUS = ROOT / "tests" / "fuzz_corpus"
KEPT = sorted(path for path in CORPUS.glob("*/*"))
EXAMPLES = settings(
    max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@cache
def seeds(name: str) -> list[bytes]:
    return fuzz_targets.TARGETS[name].seeds()


def test_all_targets_have_their_parts() -> None:
    assert tuple(fuzz_targets.TARGETS) == fuzzing.NAMES == tuple(MUTATORS)
    assert {path.name for path in CORPUS.iterdir()} <= set(fuzzing.NAMES)
    assert {path.parent.name for path in KEPT} == set(fuzzing.NAMES), "a target has nothing to replay"


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_replay(path: Path) -> None:
    fuzz_targets.check(path.parent.name, path.read_bytes())


@pytest.mark.once
@pytest.mark.parametrize("name", fuzzing.NAMES)
def test_seeds(name: str) -> None:
    outcomes = {fuzz_targets.check(name, seed) for seed in seeds(name)}
    assert "accepted" in outcomes
    assert len(outcomes) > 1


# --- damage: the bytes alone, as transfer does it, and with what the reader checks first made right again ----


def splice(data: bytes, other: bytes, at: float, to: float) -> bytes:
    return data[: int(at * len(data))] + other[int(to * len(other)) :]


fractions = st.floats(0, 1)
edits = st.lists(st.tuples(st.sampled_from(["flip", "cut", "drop", "insert", "splice"]), fractions, fractions,
                           st.integers(0, 255)), min_size=1, max_size=4)  # fmt: skip


def damaged(data: bytes, other: bytes, changes: list[tuple[str, float, float, int]]) -> bytes:
    for kind, at, to, byte in changes:
        i, j = int(at * max(len(data) - 1, 0)), int(to * 16)
        if kind == "flip":
            data = data[:i] + bytes(b ^ 1 << byte % 8 for b in data[i : i + 1]) + data[i + 1 :]
        elif kind == "cut":
            data = data[:i]
        elif kind == "drop":
            data = data[:i] + data[i + 1 + j :]
        elif kind == "insert":
            data = data[:i] + bytes([byte]) * (1 + j) + data[i:]
        else:
            data = splice(data, other, at, to)
    return data


@pytest.mark.once
@pytest.mark.parametrize("name", fuzzing.NAMES)
def test_damaged_bytes(name: str) -> None:
    found = seeds(name)

    @EXAMPLES
    @given(st.sampled_from(found), st.sampled_from(found), edits, st.booleans())
    def run(seed: bytes, other: bytes, changes: list[tuple[str, float, float, int]], repair: bool) -> None:
        data = damaged(seed, other, changes)
        if repair and name in ("container", "readers"):
            data = repair_header(data)
        fuzz_targets.check(name, data)

    run()


@pytest.mark.once
@pytest.mark.parametrize("name", fuzzing.NAMES)
def test_changed_structure(name: str) -> None:
    found = seeds(name)
    outcomes: set[str] = set()

    @EXAMPLES
    @given(st.sampled_from(found), st.integers(0, 2**64 - 1))
    def run(seed: bytes, random: int) -> None:
        rng = Random(random)
        data = MUTATORS[name](seed, rng, lambda piece: plain_change(piece, rng))
        outcomes.add(fuzz_targets.check(name, data))

    run()
    assert "accepted" in outcomes, "nothing gets past the checksums: the mutator is of no use"


# --- the instrument itself ------------------------------------------------------------------------------


def test_repair_gets_past_the_checksums() -> None:
    seed = (ROOT / "spec" / "vectors" / "good" / "smallest.hlwq").read_bytes()
    assert repair_header(seed) == seed
    document, blobs = split(seed)
    assert [len(blob) for blob in blobs] == [4]
    assert document["tensors"][0]["name"] == "w"
    changed = seed.replace(b'"reason":"vector"', b'"reason":"Vector"')
    assert fuzz_targets.check("container", changed) == BadDigest.__name__
    assert fuzz_targets.check("container", repair_header(changed)) == "accepted"
    assert fuzz_targets.check("container", seed[:20] + b"\x01" + seed[21:]) == BadHeader.__name__
    worse = repair_header(seed.replace(b'"reason"', b'"raison"'))
    assert fuzz_targets.check("container", worse) == BadMetadata.__name__


def test_bugs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of another kind, an ugly message, a wrong class, and a rule that only the second reader has."""
    good = (ROOT / "spec" / "vectors" / "good" / "smallest.hlwq").read_bytes()
    unsorted = (ROOT / "spec" / "vectors" / "bad" / "tensor-order.hlwq").read_bytes()

    def broken(error: Exception) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(reader.Reader, "verify", fail)

    broken(KeyError("tensor"))
    with pytest.raises(KeyError) as caught:
        fuzz_targets.check("container", good)
    assert fuzzing.signature(caught.value).startswith("KeyError-test_fuzz_corpus-fail-")
    for error in (BadDigest("two\nlines"), IoFailure("no disk failed"), HlwqError("no class of its own")):
        broken(error)
        with pytest.raises(fuzz_targets.Violation):
            fuzz_targets.check("container", good)
    monkeypatch.undo()
    assert fuzz_targets.check("readers", unsorted) == "BadTensor"
    monkeypatch.setattr(reader, "validate", lambda *_: None)
    with pytest.raises(fuzz_targets.Violation, match="the second reader refuses"):
        fuzz_targets.check("readers", unsorted)
    shard = b"\x08" + bytes(7) + b'{"a":{}}'
    monkeypatch.setattr(fuzz_targets, "read_safetensors", lambda _: None)
    with pytest.raises(fuzz_targets.Violation, match="safetensors refuses"):
        fuzz_targets.check("differential", shard)
