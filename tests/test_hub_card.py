"""The model card: what it inherits, what it says, and that nothing hostile gets through it."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import pytest

import hlwq_convert as h
from hlwq_convert.dry_run import dry_run
from hlwq_convert.hub.bundle import make_bundle
from hlwq_convert.hub.card import Container, front_matter, license_warning, make_card, plain
from hlwq_convert.hub.evaluation import Evaluation, read_evaluation
from hlwq_convert.inspection import Inspection
from hlwq_convert.job import prepare
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadEvaluation

REPO = "org/tiny-HLWQ"


def with_source(inspection: Inspection, repo: str | None = "org/tiny", revision: str | None = "ab" * 20) -> Inspection:
    source = md.Source(repo, revision, inspection.metadata.source.files)
    return msgspec.structs.replace(inspection, metadata=msgspec.structs.replace(inspection.metadata, source=source))


def card_of(converted: Path, base: dict[str, object] | None = None, evaluation: Evaluation | None = None) -> str:
    return make_card(REPO, [Container("tiny.hlwq", with_source(h.inspect(converted)), evaluation)], base or {})


def test_front_matter_is_what_the_hub_reads(converted: Path) -> None:
    base = {"license": "other", "license_name": "my-licence", "license_link": "LICENSE", "language": ["no", "en"],
            "pipeline_tag": "text-generation", "tags": ["theirs"], "model-index": [{"name": "theirs"}]}  # fmt: skip
    assert front_matter(card_of(converted, base).encode()) == {
        "base_model": "org/tiny", "base_model_relation": "quantized", "language": ["no", "en"], "library_name": "hlwq",
        "license": "other", "license_link": "LICENSE", "license_name": "my-licence",
        "pipeline_tag": "text-generation", "tags": ["hlwq", "quantized"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "mit\n---\n# owned",
        "a: b",
        "- x",
        "'\"",
        "!!python/object/apply:os.system [ls]",
        "\u2028tags: [x]",
        "&a *a",
        "no",
    ],
)
def test_hostile_licences_stay_texts(converted: Path, text: str) -> None:
    card = card_of(converted, {"license": text, "language": [text]})
    found = front_matter(card.encode())
    assert (found["license"], found["language"], found["base_model"]) == (text, [text], "org/tiny")
    assert card.count("\n---\n") == 1


@pytest.mark.parametrize("value", [{"a": "b"}, ["x" * 201], [["x"]], "x" * 501, "", []])
def test_what_is_no_text_is_not_inherited(converted: Path, value: object) -> None:
    assert "license" not in front_matter(card_of(converted, {"license": value}).encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"---\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\r\nlanguage: no\r\n---\r\n# x", {"language": "no"}),
        (b"\xef\xbb\xbf---\na: 1.0\n---", {"a": "1.0"}),
        (b"# no front matter\n---\na: b\n---\n", {}),
        (b"---\n- a\n---\n", {}),
        (b"---\na: [\n---\n", {}),
        (b"---\n" + b"[" * 5_000 + b"\n---\n", {}),
        (b"---\n? [a]\n: b\n---\n", {}),
        (b"---\na: !!python/object/apply:os.getcwd []\n---\n", {"a": []}),  # a list, not a call
        (b"\xff\xfe---", {}),
        (b"---\na: b\n" + b"#" * 100_000 + b"\n---\n", {}),
    ],
)
def test_reading_front_matter(text: bytes, expected: dict[str, str]) -> None:
    assert front_matter(text) == expected


def test_numbers_are_those_of_the_file(converted: Path) -> None:
    found = h.inspect(converted)
    card = card_of(converted)
    summary = found.summary
    size = f"{found.file_bytes / 1000:.1f} kB"
    row = f"| tiny.hlwq | {size} | {found.bpw:.3f} | {summary.cosine_min:.5f} | {summary.sqnr_db_mean:.2f} |"
    assert row in card
    assert f"tiny.hlwq `{found.content_id}`" in card and "arxiv.org/abs/2603.29078" in card
    assert "arxiv.org/abs/2411.17525" in card and f"org/tiny@{'ab' * 20} tiny.hlwq --bits 5" in card
    assert "Output against the source" not in card and "perplexity" not in card


def test_measured_output(converted: Path) -> None:
    content = str(h.inspect(converted).content_id)
    evaluation = Evaluation(content, "a|b `text`\n::error::", 512, 12.34567, 1.0123456, 0.0123456, 0.1)
    card = card_of(converted, evaluation=evaluation)
    shown = "a&#124;b &#96;text&#96;&#92;n:&#58;error:&#58;"
    assert f"| tiny.hlwq | {shown} | 512 | 12.3457 | 1.01235 | 0.012346 | 0.100000 |" in card


def test_a_local_model_has_no_base(converted: Path) -> None:
    card = make_card(REPO, [Container("tiny.hlwq", h.inspect(converted))], {})
    assert "base_model" not in front_matter(card.encode())
    assert "A local model, quantized by" in card and "hlwq-convert MODEL_DIR tiny.hlwq --bits 5" in card


def test_a_hostile_origin_is_no_link(converted: Path) -> None:
    hostile = with_source(h.inspect(converted), "org/x](http://evil)\u202e", "v1")
    card = make_card(REPO, [Container("tiny.hlwq", hostile)], {})
    assert "base_model" not in front_matter(card.encode()) and "](http://evil" not in card.split("```")[0]
    assert "\u202e" not in card


def test_the_command_says_what_the_recipe_is(model: Path) -> None:
    sets = [r"layers\.0\..*down_proj=7", r"(k_proj|`v'$x)=raw"]
    job = prepare(model, recipe="mixed", sets=sets, effort="fast")
    card = make_card(REPO, [Container("m.hlwq", dry_run(job, "m.hlwq"))], {})
    (line,) = [line for line in card.splitlines() if line.startswith("hlwq-convert ")]
    words = shlex.split(line)
    assert words[:5] == ["hlwq-convert", "MODEL_DIR", "m.hlwq", "--recipe", "mixed"]
    again = prepare(model, recipe="mixed", sets=words[6:9:2], effort=words[10])
    assert again.recipe == job.recipe


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("apache-2.0", None),
        ("cc-by-nc-nd-4.0", "does not allow works made from it"),
        ("cc-by-nd-4.0", "does not allow works made from it"),
        ("cc-by-nc-4.0", None),
        ("other", "a licence of its own (llama-x)"),
        (None, "names no licence"),
    ],
)
def test_licence_warnings(licence: str | None, expected: str | None) -> None:
    warning = license_warning({"license": licence, "license_name": "llama-x"})
    assert warning is None if expected is None else warning is not None and expected in warning


def test_plain() -> None:
    assert plain("::add-mask::x") == "&#92;x3a:add-mask:&#58;x"
    assert plain("@user <img> [a](b)") == "&#64;user &#60;img&#62; &#91;a&#93;&#40;b&#41;"


def test_an_evaluation_of_another_file(converted: Path, tmp_path: Path) -> None:
    evaluation = Evaluation("0" * 64, "text", 512, 10.0, 1.0, 0.0, 0.0)
    with pytest.raises(BadEvaluation, match="an evaluation of none of these files"):
        make_bundle([converted], REPO, [evaluation])
    for text in ("{", '{"content_id": 1}', "[1]", "[" * 100_000, '{"text": "\\ud800"}'):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(BadEvaluation, match="not what hlwq-eval --json writes"):
            read_evaluation(tmp_path / "e.json")
