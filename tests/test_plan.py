"""Which tensors are quantized, at how many bits and why; recipes, duplicates and the dry run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Tensor, normal, small_model, small_tensors, tensor, write_model

from hlwq_convert import convert, job
from hlwq_convert.conversion import merge_choices, tie_warnings
from hlwq_convert.dry_run import dry_run
from hlwq_convert.duplicates import find_duplicates
from hlwq_convert.inspection import Inspection
from hlwq_convert.job import Job, prepare
from hlwq_convert.plan import MIN_ELEMENTS, Choice, plan
from hlwq_convert.recipe import builtin_recipes, make_recipe
from hlwq_convert.source import open_source
from hlwq_formats import metadata as md
from hlwq_formats.dtypes import ITEM_BITS, nbytes
from hlwq_formats.errors import BadModelDir, MissingInput, Usage
from hlwq_formats.layout import numel
from hlwq_formats.reader import Reader
from hlwq_formats.safetensors_dir import SourceTensor

LAYER = "model.layers.0."
MATRIX = (64, 128)


def planned(name: str, shape: tuple[int, ...] = MATRIX, dtype: str = "BF16") -> SourceTensor:
    return SourceTensor(name, dtype, shape, "model.safetensors", 0, nbytes(dtype, numel(shape)) or 0)


def choose(
    name: str,
    shape: tuple[int, ...] = MATRIX,
    dtype: str = "BF16",
    bits: int | None = None,
    sets: tuple[str, ...] = (),
    recipe: str | None = None,
) -> Choice:
    return plan([planned(name, shape, dtype)], make_recipe(bits, recipe, sets), len(sets))[name]


# --- without options --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_matrices_are_quantized_at_5_bits(dtype: str) -> None:
    assert choose(LAYER + "mlp.up_proj.weight", dtype=dtype) == Choice(5, "default")


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_are_those_that_were_asked_for(bits: int) -> None:
    assert choose(LAYER + "self_attn.q_proj.weight", bits=bits) == Choice(bits, "default")


@pytest.mark.parametrize("shape", [(8, 96, 64), (4, 100, 1000), (1, 64, 64)])
def test_fused_experts_are_quantized(shape: tuple[int, ...]) -> None:
    assert choose(LAYER + "mlp.experts.gate_up_proj", shape, bits=4) == Choice(4, "default")


EMBEDDINGS = ["model.embed_tokens.weight", "lm_head.weight", "wte.weight", "transformer.wpe.weight", "output.weight"]


@pytest.mark.parametrize("name", [*EMBEDDINGS, "bert.embeddings.word_embeddings.weight"])
@pytest.mark.parametrize(("bits", "expected"), [(2, 5), (4, 5), (5, 5), (6, 6), (8, 8)])
def test_embeddings_and_heads_get_at_least_5_bits(name: str, bits: int, expected: int) -> None:
    assert choose(name, bits=bits).bits == expected


def test_the_floor_of_embeddings_is_a_reason() -> None:
    assert choose("lm_head.weight", bits=3) == Choice(5, "embedding floor")


def test_the_output_of_an_attention_is_no_head() -> None:
    assert choose("encoder.layer.0.attention.output.dense.weight", bits=3) == Choice(3, "default")


RAW = [
    ("model.norm.weight", (4096,), "norm"),
    (LAYER + "input_layernorm.weight", MATRIX, "norm"),
    (LAYER + "self_attn.q_norm.weight", MATRIX, "norm"),
    ("encoder.layer.0.LayerNorm.weight", MATRIX, "norm"),
    ("h.0.ln_1.weight", MATRIX, "norm"),
    (LAYER + "self_attn.q_proj.bias", (8192,), "bias"),
    (LAYER + "mlp.experts.down_proj.bias", MATRIX, "bias"),
    (LAYER + "mlp.experts.gate_up_proj_bias", MATRIX, "bias"),
    (LAYER + "mlp.scale", (8192,), "1-D"),
    ("temperature", (), "0-D"),
    ("vision.patches.weight", (64, 3, 16, 16), "4-D"),
    ("five.weight", (2, 2, 32, 32, 32), "5-D"),
    (LAYER + "mlp.experts.down_proj", (64, 64, 63), "3-D with under 64 columns"),
    (LAYER + "mlp.gate.weight", MATRIX, "router"),
    (LAYER + "block_sparse_moe.router.weight", MATRIX, "router"),
    (LAYER + "mlp.router", MATRIX, "router"),
    (LAYER + "conv1d.weight", (128, 64, 64), "convolution"),
    (LAYER + "linear_attn.conv.weight", MATRIX, "convolution"),
    (LAYER + "mixer.A_log", MATRIX, "state-space parameter"),
    (LAYER + "mixer.D", (8192,), "state-space parameter"),
    (LAYER + "mixer.dt_proj.weight", MATRIX, "state-space parameter"),
    (LAYER + "mixer.dt_bias", (8192,), "state-space parameter"),
    (LAYER + "small.weight", (63, 65), "under 4096 elements"),
    (LAYER + "empty.weight", (0, 128), "under 4096 elements"),
]


@pytest.mark.parametrize(("name", "shape", "reason"), RAW, ids=[name for name, _, _ in RAW])
def test_what_is_delicate_or_small_stays_raw(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert choose(name, shape) == Choice(None, reason)


@pytest.mark.parametrize("dtype", sorted(ITEM_BITS.keys() - {"BF16", "F16", "F32"}))
def test_other_types_stay_raw(dtype: str) -> None:
    assert choose(LAYER + "mlp.up_proj.weight", dtype=dtype) == Choice(None, f"{dtype} is kept as it is")


@pytest.mark.parametrize("name", [LAYER + "mlp.gate_proj.weight", LAYER + "mlp.shared_expert_gate_proj.weight"])
def test_gate_projections_are_no_routers(name: str) -> None:
    assert choose(name) == Choice(5, "default")


def test_4096_elements_are_enough() -> None:
    assert MIN_ELEMENTS == 4096
    assert choose("w", (64, 64)).bits == 5


def test_every_tensor_has_a_choice_in_the_given_order() -> None:
    names = ["b", "a", "norm", "c"]
    assert list(plan([planned(name) for name in names], make_recipe())) == names


# --- --set ------------------------------------------------------------------------------------------


def test_set_gives_bits() -> None:
    assert choose(LAYER + "mlp.up_proj.weight", sets=("up_proj=3",)) == Choice(3, "rule up_proj")


def test_set_keeps_raw() -> None:
    assert choose(LAYER + "mlp.up_proj.weight", sets=("up_proj=raw",)) == Choice(None, "rule up_proj")


def test_set_searches_the_whole_name() -> None:
    tensors = [planned("model.layers.1.q.weight"), planned("model.layers.11.q.weight")]
    choices = plan(tensors, make_recipe(sets=[r"layers\.1\..*weight$=8"]))
    assert [choice.bits for choice in choices.values()] == [8, 5]


def test_set_is_split_at_the_last_equals_sign() -> None:
    assert make_recipe(sets=["(?=q)q=2=4"]).rules == [md.Rule(match="(?=q)q=2", bits=4)]


@pytest.mark.parametrize(
    ("sets", "bits"), [(("proj=3", "q=8"), 8), (("q=8", "proj=3"), 3), (("q=8", "proj=raw"), None)]
)
def test_the_last_rule_that_matches_wins(sets: tuple[str, ...], bits: int | None) -> None:
    assert choose("q_proj.weight", sets=sets).bits == bits


def test_set_goes_under_the_floor_of_embeddings() -> None:
    assert choose("lm_head.weight", bits=4, sets=("lm_head=2",)).bits == 2


FORCED = [
    (LAYER + "mlp.gate.weight", MATRIX),
    (LAYER + "router.weight", MATRIX),
    (LAYER + "conv1d.weight", (1024, 1, 4)),
    ("patch.conv.weight", (64, 3, 16, 16)),
    (LAYER + "mixer.dt_proj.weight", MATRIX),
    ("norm.weight", MATRIX),
]


@pytest.mark.parametrize(("name", "shape"), FORCED)
def test_set_forces_what_is_raw_by_name_or_rank(name: str, shape: tuple[int, ...]) -> None:
    assert choose(name, shape).bits is None
    assert choose(name, shape, sets=("weight=6",)).bits == 6


def test_set_passes_over_what_cannot_be_quantized() -> None:
    tensors = [planned("a.weight"), planned("a.bias", (8192,)), planned("a.ids", MATRIX, "I32"), planned("a.s", (8, 8))]
    choices = plan(tensors, make_recipe(sets=["^a=4"]))
    assert [choice.bits for choice in choices.values()] == [4, None, None, None]
    assert choices["a.ids"].reason == "I32 is kept as it is"


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("w.bias", (8192,), "BF16", "bias"),
        ("w.scale", (8192,), "BF16", "1-D"),
        ("w.ids", MATRIX, "I64", "I64 is kept as it is"),
        ("w.weight", (63, 65), "BF16", "under 4096 elements"),
    ],
)
def test_set_on_nothing_that_can_be_quantized(name: str, shape: tuple[int, ...], dtype: str, reason: str) -> None:
    with pytest.raises(Usage) as caught:
        choose(name, shape, dtype, sets=(r"^w\.=4",))
    assert str(caught.value).startswith(f'tensor "{name}": --set: "^w\\\\." matches only what cannot be quantized')
    assert str(caught.value).endswith(f"it is raw: {reason}")
    assert caught.value.exit_status == 2


def test_set_raw_on_what_is_raw_already_is_no_error() -> None:
    assert choose("w.bias", (8192,), sets=("bias=raw",)).bits is None


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [("q_porj", "q_proj"), (r"layers\.0\.mlp\.up_prj", "up_proj"), ("embed_token$", "embed_tokens")],
)
def test_set_on_nothing_suggests_names(pattern: str, suggestion: str) -> None:
    tensors = [planned(name, shape) for name, (_, shape, _) in small_tensors().items()]
    with pytest.raises(Usage, match="matches no tensor; did you mean ") as caught:
        plan(tensors, make_recipe(sets=[f"{pattern}=4"]), 1)
    assert suggestion in str(caught.value).partition("did you mean")[2]


def test_set_on_nothing_near_points_to_the_dry_run() -> None:
    with pytest.raises(Usage, match="--dry-run lists the names"):
        choose("w.weight", sets=("zzzzzzzz=4",))


def test_set_after_a_recipe_must_match_too() -> None:
    with pytest.raises(Usage, match="matches no tensor"):
        choose(LAYER + "mlp.up_proj.weight", recipe="mixed", sets=("q_porj=4",))


def test_rules_of_a_recipe_may_match_nothing() -> None:
    assert choose("w.weight", recipe="mixed") == Choice(5, "default")


BAD_SETS = {
    "q_proj": "expected REGEX=BITS",
    "=4": "expected REGEX=BITS",
    "q=": "expected 2 to 8",
    "q=1": "expected 2 to 8",
    "q=9": "expected 2 to 8",
    "q=05": "expected 2 to 8",
    "q= 5": "expected 2 to 8",
    "q=٥": "expected 2 to 8",
    "q=5.0": "expected 2 to 8",
    "q=RAW": "expected 2 to 8",
    "(=4": "not a regular expression",
    "[\x1b-\x01]=4": "not a regular expression",
    "a{99999999999999999999}=4": "not a regular expression",
    "(" * 20_000 + ")" * 20_000 + "=4": "--set (((",
    "(?x) q \n | k=4": "--set",
    "q" + "|q" * 3000 + "=4": "--set",
}


@pytest.mark.parametrize(("option", "problem"), BAD_SETS.items(), ids=[option[:20] for option in BAD_SETS])
def test_bad_set(option: str, problem: str) -> None:
    with pytest.raises(Usage, match=re.escape(problem)) as caught:
        make_recipe(sets=[option])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_that_do_not_exist(bits: int) -> None:
    with pytest.raises(Usage, match=f"--bits: bits are {bits}, expected 2 to 8"):
        make_recipe(bits)


# --- recipes ----------------------------------------------------------------------------------------

RECIPE = """
default = 4

[[rule]]
match = "q_proj"
bits = 6

[[rule]]
match = "v_proj"
bits = "raw"
"""


def test_a_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE)
    recipe = make_recipe(recipe=str(tmp_path / "mine.toml"), sets=["k_proj=2"], effort="fast")
    rules = [md.Rule(match="q_proj", bits=6), md.Rule(match="v_proj", bits=None), md.Rule(match="k_proj", bits=2)]
    assert recipe == md.Recipe(name="mine.toml", bits=4, effort="fast", rules=rules)


def test_set_overrules_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    assert choose("q_proj", recipe=str(tmp_path / "r.toml"), sets=("q_proj=3",)).bits == 3


def test_a_recipe_need_not_say_anything(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("")
    assert make_recipe(recipe=str(tmp_path / "r.toml")).bits == 5


def test_a_recipe_with_bits_is_a_usage_error() -> None:
    with pytest.raises(Usage, match="--bits and --recipe exclude each other"):
        make_recipe(5, "uniform")


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(MissingInput, match=r"^nowhere\.toml: no such recipe: .*; built in: mixed, uniform$"):
        make_recipe(recipe="nowhere.toml")


BAD_RECIPES = {
    "no TOML": "default =",
    "unknown key": "bits = 5",
    "unknown key in a rule": '[[rule]]\nmatch = "q"\nbits = 4\neffort = 1',
    "rule without bits": '[[rule]]\nmatch = "q"',
    "rule without match": "[[rule]]\nbits = 4",
    "default too large": "default = 9",
    "default: float": "default = 5.0",
    "default: bool": "default = true",
    "default: raw": 'default = "raw"',
    "bits: 1": '[[rule]]\nmatch = "q"\nbits = 1',
    "bits: float": '[[rule]]\nmatch = "q"\nbits = 4.5',
    "bits: text": '[[rule]]\nmatch = "q"\nbits = "many\\u001b"',
    "no expression": '[[rule]]\nmatch = "("\nbits = 4',
    "expression of two lines": '[[rule]]\nmatch = """(?x)q\n|k"""\nbits = 4',
    "deep": "default = " + "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(Usage, match=r"r\.toml") as caught:
        make_recipe(recipe=str(tmp_path / "r.toml"))
    assert str(caught.value).isprintable()


def test_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff")
    with pytest.raises(Usage, match="not UTF-8"):
        make_recipe(recipe=str(tmp_path / "r.toml"))


def test_the_name_of_a_recipe_is_printed_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\x1b\n.toml").write_text("default = 9")
    with pytest.raises(Usage) as caught:
        make_recipe(recipe=str(tmp_path / "a\x1b\n.toml"))
    assert str(caught.value).isprintable()


def test_uniform_is_what_happens_without_options() -> None:
    assert builtin_recipes() == ["mixed", "uniform"]
    tensors = [planned(name, shape) for name, (_, shape, _) in small_tensors().items()]
    assert plan(tensors, make_recipe(recipe="uniform")) == plan(tensors, make_recipe())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        (LAYER + "mlp.gate_proj.weight", 3),
        (LAYER + "mlp.up_proj.weight", 3),
        (LAYER + "mlp.experts.3.gate_proj.weight", 3),
        (LAYER + "mlp.down_proj.weight", 4),
        (LAYER + "self_attn.q_proj.weight", 5),
        (LAYER + "self_attn.k_proj.weight", 5),
        (LAYER + "self_attn.v_proj.weight", 5),
        (LAYER + "self_attn.o_proj.weight", 6),
        ("model.embed_tokens.weight", 5),
        ("lm_head.weight", 6),
        ("encoder.layer.0.attention.output.dense.weight", 5),
    ],
)
def test_mixed(name: str, bits: int) -> None:
    assert choose(name, recipe="mixed").bits == bits


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (LAYER + "mlp.gate.weight", MATRIX),
        (LAYER + "self_attn.q_norm.weight", MATRIX),
        (LAYER + "self_attn.q_proj.bias", (8192,)),
        (LAYER + "mlp.experts.down_proj_bias", MATRIX),
        ("vision_model.embeddings.patch_embedding.weight", (64, 3, 16, 16)),
    ],
)
def test_mixed_leaves_delicate_tensors_raw(name: str, shape: tuple[int, ...]) -> None:
    assert choose(name, shape, recipe="mixed").bits is None


# --- duplicates -------------------------------------------------------------------------------------

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def duplicates(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    source = open_source(write_model(folder, tensors))
    return find_duplicates(source.model, source.tensors)


def test_equal_tensors_are_found_and_the_first_stays(tmp_path: Path) -> None:
    same = normal((300, 96))
    assert duplicates(tmp_path, {"c": same, "a": same, "b": same, "d": normal((300, 96), 1)}) == {"b": "a", "c": "a"}


def test_equal_tensors_in_two_shards_are_found(tmp_path: Path) -> None:
    source = open_source(write_model(tmp_path, {"a": normal(MATRIX), "b": normal(MATRIX)}, shards=2))
    assert find_duplicates(source.model, source.tensors) == {"b": "a"}


@pytest.mark.parametrize("at", [0, 14_400, 28_799])
def test_one_bit_makes_a_difference(tmp_path: Path, at: int) -> None:
    dtype, shape, data = normal((150, 96))
    other = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    assert duplicates(tmp_path, {"a": (dtype, shape, data), "b": (dtype, shape, other)}) == {}


def test_zero_and_minus_zero_differ(tmp_path: Path) -> None:
    assert duplicates(tmp_path, {"a": tensor(np.zeros(9), "F32"), "b": tensor(-np.zeros(9), "F32")}) == {}


@pytest.mark.parametrize(("dtype", "shape"), [("F16", (64, 128)), ("BF16", (128, 64)), ("BF16", (8192,))])
def test_the_same_bytes_of_another_kind_differ(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    data = normal(MATRIX)[2]
    assert duplicates(tmp_path, {"a": ("BF16", MATRIX, data), "b": (dtype, shape, data)}) == {}


@pytest.mark.parametrize("empty", [("F32", (0,), b""), ("F32", (), bytes(4))])
def test_small_tensors_are_compared_too(tmp_path: Path, empty: Tensor) -> None:
    assert duplicates(tmp_path, {"a": empty, "b": empty}) == {"b": "a"}


@pytest.mark.parametrize(
    ("first", "second", "kept"), [(4, 6, 6), (6, 4, 6), (None, 8, None), (8, None, None), (5, 5, 5)]
)
def test_an_alias_stands_at_the_larger_bits(first: int | None, second: int | None, kept: int | None) -> None:
    choices = {"a": Choice(first, "x"), "b": Choice(second, "y"), "c": Choice(2, "z")}
    merged = merge_choices(choices, {"b": "a"})
    assert (merged["a"].bits, merged["c"].bits) == (kept, 2)


def test_the_larger_bits_bring_their_reason() -> None:
    choices = {"a": Choice(5, "x"), "b": Choice(6, "y"), "c": Choice(None, "z")}
    assert merge_choices(choices, {"b": "a"})["a"] == Choice(6, "y")
    assert merge_choices(choices, {"b": "a", "c": "a"})["a"] == Choice(None, "z")


def test_merging_changes_nothing_that_was_given() -> None:
    choices = {"a": Choice(4, "x"), "b": Choice(6, "y")}
    merge_choices(choices, {"b": "a"})
    assert choices["a"] == Choice(4, "x")


def tied_job(folder: Path, tensors: dict[str, Tensor], tied: object = True) -> tuple[Job, list[str]]:
    job = prepare(write_model(folder, tensors, config={"tie_word_embeddings": tied}))
    return job, tie_warnings(job, find_duplicates(job.source.model, job.source.tensors))


def test_different_weights_under_a_tie_are_kept_with_a_warning(tmp_path: Path) -> None:
    job, warnings = tied_job(tmp_path, {EMBED: normal(MATRIX), HEAD: normal(MATRIX, 1)})
    assert warnings == ["config.json ties lm_head to the embeddings, but their weights differ: both are kept"]
    assert {name: choice.bits for name, choice in job.choices.items()} == {EMBED: 5, HEAD: 5}


def test_equal_weights_under_a_tie_need_no_warning(tmp_path: Path) -> None:
    assert tied_job(tmp_path, {EMBED: normal(MATRIX), HEAD: normal(MATRIX)})[1] == []


@pytest.mark.parametrize("tied", [False, None])
def test_different_weights_without_a_tie_need_no_warning(tmp_path: Path, tied: object) -> None:
    assert tied_job(tmp_path, {EMBED: normal(MATRIX), HEAD: normal(MATRIX, 1)}, tied)[1] == []


def test_a_head_that_is_omitted_needs_no_warning_and_stays_omitted(tmp_path: Path) -> None:
    job, warnings = tied_job(tmp_path, {EMBED: normal(MATRIX)})
    assert (warnings, list(job.choices)) == ([], [EMBED])


# --- the dry run ------------------------------------------------------------------------------------


def both(folder: Path, tensors: dict[str, Tensor] | None = None, **options: Any) -> tuple[Inspection, Inspection]:
    """What a dry run says of a model, and what its conversion says."""
    source = small_model(folder / "m") if tensors is None else write_model(folder / "m", tensors)
    out = folder / "out.hlwq"
    return dry_run(prepare(source, **options), out), convert(source, out, **options)


@pytest.mark.parametrize("options", [{}, {"bits": 2}, {"recipe": "mixed"}, {"sets": [".=raw"]}, {"passthrough": True}])
def test_a_dry_run_knows_the_size(tmp_path: Path, options: dict[str, Any]) -> None:
    guess, real = both(tmp_path, **options)
    assert real.file_bytes == (tmp_path / "out.hlwq").stat().st_size
    assert abs(guess.file_bytes - real.file_bytes) <= 200


def test_a_dry_run_knows_the_size_without_duplicates(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": normal((64, 65), i) for i in range(40)}
    guess, real = both(tmp_path, tensors)
    assert abs(guess.file_bytes - real.file_bytes) <= 200


def test_a_dry_run_knows_each_tensor(tmp_path: Path) -> None:
    guess, real = both(tmp_path)
    assert [(t.name, t.shape, t.dtype, t.encoding, t.bits, t.bytes, t.reason) for t in guess.tensors] == [
        (t.name, t.shape, t.dtype, t.encoding, t.bits, t.bytes, t.reason) for t in real.tensors
    ]


def test_a_dry_run_knows_the_bits_of_a_weight(tmp_path: Path) -> None:
    guess, real = both(tmp_path)
    assert guess.weights == real.weights == 186_336
    assert guess.bpw == pytest.approx(real.bpw, rel=0.002)


def test_a_dry_run_measures_nothing(tmp_path: Path) -> None:
    guess = dry_run(prepare(small_model(tmp_path)), "out.hlwq")
    assert (guess.content_id, guess.file_id, guess.summary.cosine_min) == (None, None, None)


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    job = prepare(small_model(tmp_path / "m"))
    before = sorted(tmp_path.rglob("*"))
    dry_run(job, tmp_path / "out.hlwq")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> bytes:
        raise AssertionError("weights were read")

    monkeypatch.setattr("hlwq_formats.safetensors_dir.ModelDir.read", read)
    assert dry_run(prepare(small_model(tmp_path)), "out.hlwq").summary.quantized == 15


# --- the package ------------------------------------------------------------------------------------


def test_convert_is_a_function_after_its_module_was_imported() -> None:
    code = "from hlwq_convert.conversion import run; import hlwq_convert as h; assert callable(h.convert)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_reason_holds_the_rule_as_it_was_written() -> None:
    assert choose("layers.0.w.weight", sets=(r"layers\.0\.=7",)) == Choice(7, r"rule layers\.0\.")


def test_more_tensors_than_the_metadata_can_describe_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "m", {f"t{i}": ("F32", (64, 64), bytes([i]) * 64 * 64 * 4) for i in range(40)})
    convert(source, tmp_path / "o.hlwq")
    with Reader(tmp_path / "o.hlwq") as reader:
        real = reader.header.meta_len
    monkeypatch.setattr(job, "_MANY", 40)
    monkeypatch.setattr(job, "MAX_METADATA", real + 40)
    prepare(source)
    monkeypatch.setattr(job, "MAX_METADATA", real - 1000)
    with pytest.raises(BadModelDir, match=r"40 tensors need about [0-9]+ bytes of metadata, a file can hold"):
        prepare(source)
