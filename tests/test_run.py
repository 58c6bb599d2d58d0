"""hlwq-run as people use it: text on stdout, figures on stderr, one line for what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run

import hlwq_convert as h

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_load_model import add_tokenizer, source_model  # noqa: E402

# no socket can be made in the process, so nothing can come from a network
OFFLINE = "import socket\ndef refuse(*_, **__): raise AssertionError('network')\nsocket.socket.connect = refuse\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes nonsense, with a tokenizer of ten words."""
    folder = tmp_path_factory.mktemp("run")
    model = source_model("llama, tied")
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # it goes on as long as it may
    model.save_pretrained(folder / "source")
    add_tokenizer(folder / "source")
    h.convert(folder / "source", folder / "out.hlwq")
    return folder / "out.hlwq"


@pytest.fixture
def run(run_tool: Run, tmp_path: Path) -> Run:
    """hlwq-run without a network."""
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)

    def run_offline(*arguments: str | Path) -> object:
        return run_tool("run", *arguments, env={"PYTHONPATH": str(tmp_path)})

    return run_offline  # type: ignore[return-value]


def test_text_and_figures(run: Run, file: Path) -> None:
    done = run(file, "--prompt", "a b c", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "hlwq: 3 + 4 tokens, the first in " in done.stderr
    assert " tokens/s; loaded dense in " in done.stderr and "peak memory" in done.stderr


def test_json_of_a_chat_with_packed_weights(run: Run, file: Path) -> None:
    done = run(file, "--prompt", "a b", "--chat", "--max-new-tokens", "3", "--weights", "packed", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["prompt_tokens"], found["new_tokens"], found["weights"]) == (3, 3, "packed")  # "user a b"
    assert found["first_token_seconds"] > 0 and found["tokens_per_second"] > 0 and found["peak_bytes"] > 10**7
    model, tokenizer = h.load_model(file, weights="packed")
    tokens = model.generate(**tokenizer("user a b", return_tensors="pt"), max_new_tokens=3, do_sample=False)[0, 3:]
    assert found["text"] == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--prompt", "a", "--weights", "int8"), 2, "int8"),
        (("--prompt", "a", "--max-new-tokens", "0"), 2, "0 is not in the range"),
    ],
)
def test_what_makes_no_sense(run: Run, file: Path, arguments: tuple[str, ...], status: int, message: str) -> None:
    done = run(file, *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_models_and_prompts_without_an_answer(file: Path, tmp_path: Path) -> None:
    from hlwq_convert.runtime.generate import generate
    from hlwq_formats.errors import Usage

    with pytest.raises(Usage, match="the prompt is empty"):
        generate(*h.load_model(file), "")
    source_model("bert").save_pretrained(tmp_path / "bert")
    h.convert(tmp_path / "bert", tmp_path / "bert.hlwq")
    with pytest.raises(Usage, match="BertForMaskedLM does not generate text"):
        generate(*h.load_model(tmp_path / "bert.hlwq"), "a")
    source = Path(shutil.copytree(file.parent / "source", tmp_path / "source"))
    (source / "chat_template.jinja").unlink()
    h.convert(source, tmp_path / "silent.hlwq")
    with pytest.raises(Usage, match="the file carries no chat template"):
        generate(*h.load_model(tmp_path / "silent.hlwq"), "a", chat=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    h.convert(source, tmp_path / "dumb.hlwq")
    with pytest.raises(Usage, match="the file carries no tokenizer"):
        generate(*h.load_model(tmp_path / "dumb.hlwq"), "a")


def test_a_prompt_is_given_to_a_quantized_cache_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_load_model import DECODER, MODELS

    from hlwq_convert.runtime.generate import generate

    monkeypatch.setitem(MODELS, "llama", (MODELS["llama"][0], DECODER | {"head_dim": 64}))
    model, tokenizer = source_model("llama").eval(), h.load_model(file)[1]
    sizes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape[1]))
    made = generate(model, tokenizer, "a b c d " * 35, kv_bits=3, max_new_tokens=4)
    assert (made.prompt_tokens, sizes) == (140, [64, 64, 12, 1, 1, 1])


def test_what_a_model_writes_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from hlwq_convert.cli.run import _show

    _show("é\x1b[2J\n\ttext\r\u202e")
    assert capsys.readouterr().out == "é\\x1b[2J\n\ttext\\r\\u202e"
