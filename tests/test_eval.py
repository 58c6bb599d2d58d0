"""hlwq-eval on a tiny model of transformers, as a user runs it: figures, cache, charts, sensitivities, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hlwq_convert as h
from hlwq_formats.errors import HlwqError, MissingInput, NotFromSource, UnsupportedFeature, Usage

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from hlwq_convert.evaluation.reference import SAMPLES, TOP_K  # noqa: E402
from hlwq_convert.evaluation.windows import cut_windows, read_text  # noqa: E402
from hlwq_convert.kernels.compiled import CACHE_FOLDER  # noqa: E402
from hlwq_convert.runtime import peers as peers_module  # noqa: E402
from hlwq_convert.runtime.causal_model import file_model, load_tokenizer, source_model  # noqa: E402
from hlwq_convert.runtime.evaluate import Ground, evaluate, prepare_ground  # noqa: E402
from hlwq_convert.runtime.peers import Peer, apply_peer  # noqa: E402
from hlwq_convert.runtime.scoring import first_token, score, source_reference  # noqa: E402
from hlwq_convert.runtime.sensitivity import measure_sensitivity  # noqa: E402
from hlwq_convert.source import open_source  # noqa: E402

LM_EVAL = find_spec("lm_eval") is not None  # the extra `tasks`
CPU = torch.device("cpu")
torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
VOCABULARY = 700  # more than TOP_K, so that samples are drawn


def silent(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with tied embeddings and a tokenizer of bytes; tests must not change it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", *alphabet, *(f"<{i}>" for i in range(VOCABULARY - 1 - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model at 3 and 6 bits, by the trellis, and unquantized."""
    folder = tmp_path_factory.mktemp("files")
    for bits in (3, 6):
        h.convert(tiny, folder / f"{bits}.hlwq", bits=bits, sets=[f".*={bits}"])
    h.convert(tiny, folder / "trellis.hlwq", size=100_000)
    h.convert(tiny, folder / "raw.hlwq", sets=[".*=raw"])
    return {path.stem: str(path) for path in folder.glob("*.hlwq")}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    if CACHE_FOLDER is not None:  # machine code is not what is tested here
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(Path(CACHE_FOLDER).parents[1]))
    return folder / "hlwq" / "references"


@pytest.fixture
def ground(tiny: Path) -> Ground:
    return prepare_ground(str(tiny), None, 64, 4, "float32", "cpu", silent, silent)


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = "from hlwq_convert.cli.eval import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)


# --- the figures ----------------------------------------------------------------------------------


def exact_log_probabilities(model: Any, windows: np.ndarray) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(windows)).logits[:, :-1].double().log_softmax(2)


def test_scores_are_those_of_the_definitions(tiny: Path, files: dict[str, str]) -> None:
    source = open_source(tiny)
    tokenizer = load_tokenizer(source)
    assert first_token(tokenizer) == 0
    tokens = tokenizer(read_text(None)[:8000], add_special_tokens=False).input_ids
    windows = cut_windows(tokens, 0, 64, 8)
    original = source_model(source, torch.float32, CPU)
    quantized = file_model(files["3"], source, torch.float32, CPU)
    p, q = exact_log_probabilities(original, windows), exact_log_probabilities(quantized, windows)
    exact = (p.exp() * (p - q)).sum(2).numpy()
    targets = torch.from_numpy(windows)[:, 1:, None]

    reference = source_reference(original, windows, silent)
    assert reference.top.shape == (8, 63, TOP_K) and reference.sample.shape == (8, 63, SAMPLES)
    assert np.allclose(reference.nll, -p.gather(2, targets)[:, :, 0].numpy(), atol=1e-4)
    assert reference.rest == pytest.approx(float(1 - p.exp().topk(TOP_K).values.sum(2).mean()), abs=1e-5)
    found = score(quantized, windows, reference, silent)
    assert np.allclose(found.nll, -q.gather(2, targets)[:, :, 0].numpy(), atol=1e-4)
    assert np.array_equal(found.agree, (p.argmax(2) == q.argmax(2)).numpy())
    assert exact.mean() > 0.01
    assert found.kl.mean() == pytest.approx(exact.mean(), rel=0.01)  # samples stand for the tail
    merged = score(quantized, windows, source_reference(original, windows, silent, TOP_K, 0), silent)
    assert (merged.kl < exact + 1e-5).all() and merged.kl.mean() < 0.97 * exact.mean()

    whole = score(quantized, windows, source_reference(original, windows, silent, VOCABULARY), silent)
    assert np.allclose(whole.kl, exact, atol=1e-5)


def test_an_unquantized_file_is_the_source(ground: Ground, files: dict[str, str]) -> None:
    (itself, raw) = evaluate([files["raw"]], ground, silent).entries
    assert (raw.kind, raw.encoding) == ("hlwq", None) and raw.bytes == Path(files["raw"]).stat().st_size
    found = raw.quality
    assert (found.perplexity_ratio, found.top1) == (1, 1)
    assert found.perplexity == itself.quality.perplexity
    assert 0 <= found.kl_max < 1e-6


def test_more_bits_are_closer_and_files_of_other_weights_are_warned_about(
    tiny: Path, ground: Ground, files: dict[str, str], tmp_path: Path
) -> None:
    document = evaluate([files["3"], files["6"]], ground, silent)
    coarse, fine = (entry.quality for entry in document.entries[1:])
    assert fine.kl_mean < coarse.kl_mean / 10 and fine.top1 > coarse.top1
    assert document.warnings == []
    assert [entry.encoding for entry in document.entries] == [None, "scalar", "scalar"]
    assert evaluate([files["trellis"]], ground, silent).entries[1].encoding == "trellis"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    h.convert(tmp_path / "other", tmp_path / "other.hlwq")
    (warning,) = evaluate([str(tmp_path / "other.hlwq")], ground, silent).warnings
    assert '1 tensors were made from other weights, such as "model.layers.0.mlp.up_proj.weight"' in warning


# --- peers ----------------------------------------------------------------------------------------


def test_a_peer_is_measured_with_the_bits_that_it_stores(tiny: Path) -> None:
    source = open_source(tiny)
    model, original = (source_model(source, torch.float32, CPU) for _ in range(2))

    def to_sevenths(weight: Any) -> tuple[Any, int]:
        assert weight.dtype == torch.bfloat16  # the source's
        scale = weight.abs().max() / 7
        return (weight / scale).round() * scale, 4 * weight.numel() + 16

    size, bpw = apply_peer(Peer("rounding", to_sevenths), model, source)
    linear = [layer for name, layer in model.named_modules() if name.endswith("_proj")]
    quantized, every = sum(layer.weight.numel() for layer in linear), sum(t.numel for t in source.tensors)
    assert len(linear) == 14 and every == sum(p.numel() for p in model.parameters())
    bits = 16 * (every - quantized) + 4 * quantized + 16 * len(linear)
    assert (size, bpw) == (bits // 8, bits / every)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert not torch.equal(linear[0].weight, original.model.layers[0].self_attn.q_proj.weight)


def test_peers_that_are_not_there_are_listed(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "torchao.quantization", "hqq.core.quantize"):
        monkeypatch.setitem(sys.modules, name, None)
    document = evaluate([], ground, silent, peers=True)
    assert [missing.name for missing in document.missing] == [peer.name for peer in peers_module.PEERS]
    assert all("ImportError" in m.why or "ModuleNotFoundError" in m.why for m in document.missing)
    assert len(document.entries) == 1


@pytest.mark.parametrize(("package", "number"), [("bitsandbytes", 0), ("torchao", 1), ("hqq", 2)])
def test_real_peers(package: str, number: int) -> None:
    pytest.importorskip(package)
    weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    restored, stored = peers_module.PEERS[number].quantize(weight)
    assert stored == 4.5 * weight.numel()
    relative = ((restored.float() - weight.float()).square().sum() / weight.float().square().sum()).item()
    assert 0.004 < relative < 0.012


# --- the command ----------------------------------------------------------------------------------


def test_the_command_and_its_cache(tiny: Path, files: dict[str, str], cache: Path, tmp_path: Path) -> None:
    arguments = [files["3"], files["6"], "--against", str(tiny), "--ctx", "48", "--windows", "3", "--json"]
    first = run(*arguments, "--chart", str(tmp_path / "c.png"))
    assert (first.returncode, first.stderr) == (0, "")
    document = json.loads(first.stdout)
    assert [entry["kind"] for entry in document["entries"]] == ["source", "hlwq", "hlwq"]
    assert (document["ctx"], document["windows"], document["tokens"]) == (48, 3, 141)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    (kept,) = cache.iterdir()
    good, time = kept.read_bytes(), kept.stat().st_mtime_ns
    ground = prepare_ground(str(tiny), None, 48, 3, "float32", "cpu", silent, silent)
    assert kept.stat().st_mtime_ns == time  # read, not made again
    for name, array in vars(ground.reference).items():
        assert array.shape[:2] == (3, 47), name
    kept.write_bytes(good[:-9] + b"x" + good[-8:])
    assert json.loads(run(*arguments).stdout) == document
    assert kept.read_bytes() == good


def test_markdown_when_not_a_terminal(tiny: Path, files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some text that is long enough for three windows of it, " * 4)
    result = run(files["6"], "--against", str(tiny), "--ctx", "40", "--text", str(tmp_path / "t.txt"))
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[2].startswith("| model | ") and lines[3].startswith("| 6.hlwq | ")
    assert "t.txt: 195 predictions in 5 windows of 40 tokens, float32 on cpu." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--against", "{model}"], 2, "there is nothing to measure"),
        (["{file}"], 2, "--against"),
        (["{file}", "--against", "{model}", "--budget", "1"], 2, "--budget is for --sensitivity"),
        (["{file}", "--against", "{model}", "--sensitivity", "{tmp}/s.json", "--peers"], 2, "--sensitivity takes"),
        (["{file}", "--against", "{model}", "--ctx", "257"], 2, "the model takes 256 tokens"),
        (["{file}", "--against", "{tmp}/none"], 66, "none"),
        (["{tmp}/none.hlwq", "--against", "{model}", "--ctx", "9"], 66, "none.hlwq"),
        (["{file}", "--against", "{model}", "--chart", "{tmp}/none/c.png"], 73, "folder does not exist"),
    ],
)
def test_refusals_are_one_line(
    tiny: Path, files: dict[str, str], tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    places = {"model": str(tiny), "file": files["6"], "tmp": str(tmp_path)}
    result = run(*(argument.format(**places) for argument in arguments))
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.startswith("hlwq: error[HLWQ-") and result.stderr.count("\n") == 1 and words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_found_before_the_source_is_read(tiny: Path, cache: Path, tmp_path: Path) -> None:
    result = run(str(tmp_path / "none.hlwq"), "--against", str(tiny), "--ctx", "16")
    assert result.returncode == 66 and "none.hlwq" in result.stderr
    assert not cache.exists()  # nothing was predicted


def test_bad_options_and_files_are_named(tiny: Path, ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="--device nonesuch"):
        prepare_ground(str(tiny), None, 64, 4, "float32", "nonesuch", silent, silent)
    with pytest.raises(MissingInput, match="none"):
        prepare_ground(str(tiny), str(tmp_path / "none"), 64, 4, "float32", "cpu", silent, silent)
    with pytest.raises(HlwqError, match=r"config\.json"):
        evaluate([str(tiny / "config.json")], ground, silent)


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']; from hlwq_convert.cli.eval import main\n"
        "try: main()\n"
        "finally: print([m for m in ('numpy', 'torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--sensitivity" in result.stdout


def test_a_file_of_another_architecture_is_refused(tiny: Path, converted: Path) -> None:
    with pytest.raises(NotFromSource, match=r"has no use for|needs another shape of"):
        file_model(converted, open_source(tiny), torch.float32, CPU)


def test_a_file_that_lacks_a_tensor_is_refused(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    h.convert(tmp_path / "m", tmp_path / "o.hlwq")
    with pytest.raises(NotFromSource, match=r'lacks 1 tensors, such as "model\.layers\.1\.mlp\.up_proj\.weight"'):
        file_model(tmp_path / "o.hlwq", open_source(tiny), torch.float32, CPU)


def test_models_that_bring_code_are_refused(model: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises((UnsupportedFeature, MissingInput)):
        prepare_ground(str(model), None, 64, 4, "float32", "cpu", silent, silent)
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tiny / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((UnsupportedFeature, MissingInput)):
        prepare_ground(str(tmp_path), None, 64, 4, "float32", "cpu", silent, silent)
    assert not (tmp_path / "ran").exists()


# --- sensitivities --------------------------------------------------------------------------------


def test_sensitivities_are_those_of_one_tensor_at_a_time(
    tiny: Path, ground: Ground, files: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    found = measure_sensitivity(files["3"], str(out), ground, silent)
    assert len(found.tensors) == 11 and found.predicted == []
    assert np.mean([np.log2(s) for n, s in found.tensors.items() for _ in range(found.measured[n].weights)]) == (
        pytest.approx(0, abs=1e-9)
    )
    name = "model.layers.1.mlp.down_proj.weight"
    state = h.load_state_dict(files["raw"])
    noisy = h.load_state_dict(files["3"])[name].double()
    model = source_model(ground.source, torch.float32, CPU)
    original = model.get_parameter(name).data.double()
    assert torch.equal(original, state[name].double())
    assert found.measured[name].rel_mse == pytest.approx(
        float((noisy - original).square().sum() / original.square().sum())
    )
    model.get_parameter(name).data.copy_(noisy)
    assert found.measured[name].kl == float(score(model, ground.windows, ground.reference, silent).kl.mean())


def test_a_budget_ends_early_and_the_next_run_goes_on(
    ground: Ground, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_sensitivity(files["3"], str(tmp_path / "whole.json"), ground, silent)
    out = str(tmp_path / "s.json")
    assert len(measure_sensitivity(files["3"], out, ground, silent, budget=0).predicted) == 11

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(files["3"], out, ground, stop)
    kept = json.loads(Path(out).read_text())
    assert len(kept["measured"]) == 4 and len(kept["predicted"]) == 7 and len(kept["tensors"]) == 11
    assert "model.embed_tokens.weight" in kept["measured"]  # the largest
    seen: list[int] = []
    assert measure_sensitivity(files["3"], out, ground, lambda done, total: seen.append(done)) == whole
    assert seen[-1] == 11
    assert Path(out).read_bytes() == (tmp_path / "whole.json").read_bytes()
    with pytest.raises(HlwqError, match="its noise differs"):
        measure_sensitivity(files["6"], out, ground, silent)


def test_the_command_measures_sensitivities_without_a_file(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    result = run("--against", str(tiny), "--ctx", "16", "--windows", "2", "--sensitivity", str(out))
    assert (result.returncode, result.stderr) == (0, "")
    assert "11 tensors, 0 of them predicted" in result.stdout
    assert len(json.loads(out.read_text())["measured"]) == 11


# --- tasks ----------------------------------------------------------------------------------------


def test_tasks_without_lm_eval_are_an_error(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingInput, match="lm_eval is not installed"):
        evaluate([], ground, silent, tasks=["arc_challenge"])


@pytest.mark.skipif(LM_EVAL, reason="lm-eval is installed")
def test_the_command_says_that_lm_eval_is_not_installed(tiny: Path, files: dict[str, str]) -> None:
    result = run(files["3"], "--against", str(tiny), "--tasks", "arc_challenge")
    assert (result.returncode, result.stdout) == (66, "")
    assert result.stderr == 'hlwq: error[HLWQ-201]: lm_eval is not installed; pip install "hlwq-convert[tasks]"\n'


@pytest.mark.skipif(not LM_EVAL, reason="lm-eval is not installed")
def test_data_sets_that_cannot_be_had_offline_are_an_error(tiny: Path, files: dict[str, str], tmp_path: Path) -> None:
    arguments = (files["3"], "--against", str(tiny), "--ctx", "16", "--windows", "1", "--tasks", "arc_challenge")
    result = run(*arguments, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert (result.returncode, result.stdout) == (66, "")
    assert result.stderr.startswith("hlwq: error[HLWQ-201]: --tasks arc_challenge: its data set cannot be had: ")
    assert result.stderr.count("\n") == 1 and "allenai/ai2_arc" in result.stderr and "network" in result.stderr


@pytest.mark.skipif(not LM_EVAL, reason="lm-eval is not installed")
def test_tasks_of_lm_eval(tiny: Path, files: dict[str, str], tmp_path: Path) -> None:
    questions = [{"question": f"{i} is", "choices": [" even", " odd"], "answer": i % 2} for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "parity.yaml").write_text(
        f"task: parity\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/questions.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    arguments = ("--against", str(tiny), "--ctx", "16", "--windows", "1", "--json", "--tasks")
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = run(files["raw"], files["3"], *arguments, str(tmp_path / "parity.yaml"), **offline)
    assert (result.returncode, result.stderr) == (0, "")
    same, other = json.loads(result.stdout)["tasks"]
    assert (same["samples"], same["difference"], same["source_better"], same["model_better"]) == (40, 0, 0, 0)
    assert other["difference"] == pytest.approx((other["model_better"] - other["source_better"]) / 40)
    assert other["standard_error"] > 0
    result = run(files["3"], *arguments, "nonesuch", **offline)
    assert (result.returncode, result.stdout) == (2, "")
    assert "--tasks nonesuch" in result.stderr and result.stderr.count("\n") == 1
