"""hlwq-push through the real client and over HTTP: what arrives, and that nothing does when anything fails."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_client import LIBRARY_WARNING, hub, model_files, run
from hub_server import TOKEN, Hub, Repo
from models import real_model

import hlwq_convert as h
from hlwq_convert.hub.bundle import Bundle, make_bundle
from hlwq_convert.hub.push import publish
from hlwq_formats.errors import (
    BadDigest,
    CannotCreate,
    ForeignRepo,
    HubBusy,
    HubFailed,
    HubMismatch,
    HubMoved,
    HubRefused,
    Usage,
)

__all__ = ["hub"]
pytestmark = pytest.mark.filterwarnings(LIBRARY_WARNING)
TARGET = "org/tiny-HLWQ"


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 5 bits, converted from a cache that knows its repository; its licence travels with it."""
    snapshot = tmp_path_factory.mktemp("cache") / "models--org--tiny" / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    for name, data in model_files(model).items():
        if "/" not in name and name not in ("pytorch_model.bin", "run.py", "consolidated.safetensors"):
            (snapshot / name).write_bytes(data)
    (snapshot / "LICENSE").write_text("Apache License\n")
    out = tmp_path_factory.mktemp("out") / "tiny-5.hlwq"
    h.convert(snapshot, out)
    return out


def bundle(file: Path, repo: str = TARGET) -> Bundle:
    return make_bundle([file], repo, [])


def head(repo: Repo) -> str:
    return repo.refs["refs/heads/main"]


def test_push_download_load_compare(hub: Hub, file: Path, tmp_path: Path) -> None:
    done = run("push", file, TARGET, "--tag", "v1")
    assert done.returncode == 0, done.stderr
    repo = hub.repos[TARGET]
    assert f"6 files in commit {head(repo)[:12]}, each compared by its SHA-256" in done.stdout
    assert repo.refs["refs/tags/v1"] == head(repo)
    assert len(repo.commits) == 2  # the one that creation makes, and one
    assert repo.main.keys() == {
        ".gitattributes", "README.md", "LICENSE", "config.json", "tokenizer.json", "report.json", file.name
    }  # fmt: skip
    assert repo.main[file.name] == file.read_bytes()
    with h.open(file) as local:
        assert repo.main["config.json"] == local.reader.read_asset("config.json")
    report = json.loads(repo.main["report.json"])["files"][0]
    assert (report["file"], report["content_id"]) == (file.name, h.inspect(file).content_id)
    # the snippet of the card, as a reader would run it, in a process with an empty cache
    snippet = re.search(r"```python\n(.*?)```", repo.main["README.md"].decode(), re.DOTALL)
    assert snippet is not None
    probe = (
        "\nimport hashlib"
        "\nfor name, t in sorted(state_dict.items()):"
        "\n    data = t.contiguous().flatten().view(__import__('torch').uint8).numpy().tobytes()"
        "\n    print(name, t.dtype, tuple(t.shape), hashlib.sha256(data).hexdigest())"
    )
    pytest.importorskip("torch")
    import torch

    ran = subprocess.run([sys.executable, "-c", snippet[1] + probe], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    expected = [
        f"{name} {t.dtype} {tuple(t.shape)} "
        + hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in sorted(h.load_state_dict(file).items())
    ]
    assert ran.stdout.splitlines() == expected


def test_what_is_there_is_not_pushed_again(hub: Hub, file: Path) -> None:
    first = publish(bundle(file))
    hub.seen.clear()
    again = publish(bundle(file), tag="v1")
    assert (again.changed, again.commit) == (False, first.commit)
    assert hub.repos[TARGET].refs["refs/tags/v1"] == first.commit  # a tag that is missing is set all the same
    assert [path for path in hub.paths("POST") if "/tag/" not in path] == [] and hub.paths("PUT") == []
    done = run("push", file, TARGET)
    assert f"{TARGET} holds this content already, at commit {first.commit[:12]}: nothing was pushed" in done.stdout


def test_same_content_of_another_file_is_there_too(hub: Hub, file: Path, tmp_path: Path) -> None:
    """Equal tensors under another recipe: other bytes, the same content_id."""
    first = publish(bundle(file))
    other = tmp_path / file.name
    with h.open(file) as opened:
        source = opened.reader.metadata.source
    snapshot = tmp_path / f"models--{source.repo.replace('/', '--')}" / "snapshots" / ("cd" * 20)
    snapshot.mkdir(parents=True)
    origin = next(Path(file).parent.parent.glob("cache*/models--org--tiny/snapshots/*"))
    for path in origin.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    h.convert(snapshot, other)
    assert other.read_bytes() != file.read_bytes() and h.inspect(other).content_id == h.inspect(file).content_id
    assert publish(bundle(other)).commit == first.commit
    # but not when a file beside the weights differs
    (snapshot / "tokenizer.json").write_text("{}")
    h.convert(snapshot, other, overwrite=True)
    assert publish(bundle(other)).changed


def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's six tries


ALWAYS = 99
REQUESTS = [
    ("GET", f"/api/models/{TARGET}"),
    ("POST", "/api/repos/create"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/commit/"),
]


FAILURES = [
    *((method, path, how, HubFailed) for method, path in REQUESTS for how in (500, "cut")),
    ("PUT", "/lfs/", 429, HubBusy),
    ("PUT", "/lfs/", 403, HubRefused),
    ("POST", "/commit/", 401, HubRefused),
    ("POST", "/commit/", 403, HubRefused),
    ("POST", "/commit/", 412, HubMoved),
    ("POST", "/api/repos/create", 403, HubRefused),
]


@pytest.mark.parametrize(("method", "path", "how", "error"), FAILURES)
def test_nothing_is_published_after_a_failure(
    hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str, how: int | str, error: type[Any]
) -> None:
    no_sleep(monkeypatch)
    if path != "/api/repos/create":
        hub.add(TARGET, {".gitattributes": b""})
    hub.fail(method, path, how, ALWAYS)
    with pytest.raises(h.HlwqError) as caught:
        publish(bundle(file), tag="v1")
    assert isinstance(caught.value, error), caught.value
    line = str(caught.value)
    assert line.startswith(f"{TARGET}: ") and "\n" not in line and "::" not in line
    assert TOKEN not in line and "signature" not in line
    assert caught.value.__suppress_context__  # --debug prints no request of the client
    if TARGET in hub.repos:
        assert hub.repos[TARGET].main == {".gitattributes": b""} and len(hub.repos[TARGET].refs) == 1
    hub.failures.clear()
    hub.seen.clear()
    assert publish(bundle(file), tag="v1").changed  # and the next try is all that is needed
    assert len(hub.paths("PUT")) == (path != "/commit/")  # what had arrived is not sent twice


def test_an_answer_that_is_lost(hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit was made, but nobody heard: the next push finds it and sets the tag."""
    no_sleep(monkeypatch)
    hub.add(TARGET, {".gitattributes": b""})
    hub.fail("GET", "/tree/", 500, 0)
    real = Repo.commit

    def commit_then_cut(repo: Repo, files: dict[str, bytes], ref: str) -> str:
        oid = real(repo, files, ref)
        hub.fail("GET", f"/tree/{oid}", 500, ALWAYS)
        return oid

    monkeypatch.setattr(Repo, "commit", commit_then_cut)
    with pytest.raises(HubFailed, match=r"commit \w{12} was made but not compared: the Hub answered 500"):
        publish(bundle(file), tag="v1")
    assert "refs/tags/v1" not in hub.repos[TARGET].refs
    hub.failures.clear()
    outcome = publish(bundle(file), tag="v1")
    assert not outcome.changed and hub.repos[TARGET].refs["refs/tags/v1"] == outcome.commit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_push(hub: Hub, file: Path, number: signal.Signals) -> None:
    repo = hub.add(TARGET, {".gitattributes": b""})
    hub.fail("PUT", "/lfs/", "hold")
    code = "from hlwq_convert.cli.push import main; main()"
    command = [sys.executable, "-c", code, str(file), TARGET]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert hub.held.wait(60)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] in ("hlwq: interrupted", "hlwq: terminated")
    assert repo.main == {".gitattributes": b""} and hub.paths("POST")[-1].endswith("/objects/batch")


def test_someone_else_commits_meanwhile(hub: Hub, file: Path) -> None:
    repo = hub.add(TARGET, {".gitattributes": b""})

    def intrude(repo: Repo) -> None:
        hub.before_commit = None
        repo.commit({**repo.main, "config.json": b"theirs"}, "refs/heads/main")

    hub.before_commit = intrude
    with pytest.raises(HubMoved, match="someone else committed meanwhile; nothing was published; try again"):
        publish(bundle(file))
    assert repo.main == {".gitattributes": b"", "config.json": b"theirs"}


def test_what_arrives_is_compared(hub: Hub, file: Path) -> None:
    hub.add(TARGET, {".gitattributes": b""})

    def corrupt(repo: Repo) -> None:
        hub.large = {oid: data[:-1] + b"!" for oid, data in hub.large.items()}

    hub.before_commit = corrupt
    with pytest.raises(HubMismatch, match=r"after the push, tiny-5.hlwq has SHA-256 \w{16}..., expected"):
        publish(bundle(file), tag="v1")
    assert "refs/tags/v1" not in hub.repos[TARGET].refs


def test_what_does_not_arrive_is_noticed(hub: Hub, file: Path) -> None:
    """The client leaves out what a .gitignore on the Hub matches, without a word."""
    hub.ignored.add("LICENSE")
    with pytest.raises(HubMismatch, match="LICENSE is missing"):
        publish(bundle(file))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"model.safetensors": b"x", "config.json": b"{}"}, "did not write: model.safetensors;"),
        ({"README.md": b"# My model\n"}, "did not write: README.md;"),
        ({"README.md": b"---\nlibrary_name: transformers\n---\n", "config.json": b"{}"}, "did not write: README.md;"),
        ({"config.json": b"{}", "LICENSE": b""}, "did not write: LICENSE, config.json;"),
        ({f"f{i}": b"" for i in range(5)}, "did not write: f0, f1, f2 and 2 more;"),
        ({"::error::x\n": b""}, r"did not write: \x3a:error::x\n;"),
        ({"README.md": b"---\nlibrary_name: hlwq\n---\n", "old.hlwq": b""}, "it holds old.hlwq too"),
    ],
)
def test_foreign_history(hub: Hub, file: Path, files: dict[str, bytes], expected: str) -> None:
    repo = hub.add(TARGET, {".gitattributes": b"", **files})
    before = head(repo)
    with pytest.raises(ForeignRepo) as caught:
        publish(bundle(file))
    assert expected in str(caught.value) and "choose another" in str(caught.value)
    assert head(repo) == before and hub.paths("PUT") == []


def test_a_pull_request(hub: Hub, file: Path) -> None:
    repo = hub.add(TARGET, {"model.safetensors": b"theirs"})
    outcome = publish(bundle(file), create_pr=True)
    assert repo.main == {"model.safetensors": b"theirs"}
    assert repo.commits[repo.refs["refs/pr/1"]][file.name] == file.read_bytes()
    assert outcome.url.endswith("/discussions/1") and outcome.commit == repo.refs["refs/pr/1"]
    with pytest.raises(Usage, match="takes no --tag"):
        publish(bundle(file), create_pr=True, tag="v1")


def test_a_branch(hub: Hub, file: Path) -> None:
    repo = hub.add(TARGET, {".gitattributes": b""})
    outcome = publish(bundle(file), branch="next")
    assert repo.main == {".gitattributes": b""}
    assert repo.refs["refs/heads/next"] == outcome.commit and file.name in repo.commits[outcome.commit]
    foreign = hub.add("org/foreign", {"model.safetensors": b"x"})
    with pytest.raises(ForeignRepo):
        publish(bundle(file, "org/foreign"), branch="next")
    assert foreign.refs.keys() == {"refs/heads/main"}  # a branch that would start from it is not made


@pytest.mark.parametrize("private", [True, False])
def test_privacy_of_a_new_repository(hub: Hub, file: Path, private: bool) -> None:
    publish(bundle(file), private=private)
    assert hub.repos[TARGET].private is private


def test_a_tag_that_exists(hub: Hub, file: Path) -> None:
    repo = hub.add(TARGET, {".gitattributes": b""})
    repo.refs["refs/tags/v1"] = before = head(repo)
    with pytest.raises(CannotCreate, match="the tag v1 exists already; choose another --tag"):
        publish(bundle(file), tag="v1")
    assert head(repo) == before
    publish(bundle(file))
    with pytest.raises(CannotCreate, match="the tag v1 exists already, at commit"):
        publish(bundle(file), tag="v1")


def test_without_a_token(hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubRefused, match="no token: pushing needs one"):
        publish(bundle(file))
    assert not [path for path in hub.paths("GET") if TARGET in path] and hub.paths("POST") == []
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubRefused, match="needs a valid token"):
        publish(bundle(file))
    assert hub.repos == {}
    monkeypatch.setenv("HF_OIDC_RESOURCE", TARGET)  # not in a job that can mint one
    with pytest.raises(HubRefused, match="no token: HF_OIDC_RESOURCE is set but"):
        publish(bundle(file))


def test_a_trusted_publisher(hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token is stored: the identity of the CI job is exchanged for one that may write to this repository."""
    hub.add(TARGET, {".gitattributes": b""})
    hub.identities["eyJ.identity.of-a-job"] = TARGET
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", TARGET)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "eyJ.identity.of-another")
    with pytest.raises(HubRefused, match="the Hub answered 400: invalid_grant: no trusted publisher matches"):
        publish(bundle(file))
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "eyJ.identity.of-a-job")
    assert publish(bundle(file)).changed
    assert {authorization for _, path, authorization in hub.seen if "/commit/" in path} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("how", [400, 403, 500])
def test_no_output_holds_the_token(hub: Hub, file: Path, how: int) -> None:
    """The server's answer has the token in it, and a command to the CI system; --debug shows all there is."""
    hub.add(TARGET, {".gitattributes": b""})
    hub.fail("POST", "/commit/", how, ALWAYS)
    done = run("push", file, TARGET, "--debug", HF_DEBUG="1", HF_HUB_VERBOSITY="debug")
    assert done.returncode == (74 if how == 500 else 73)
    said = done.stdout + done.stderr
    assert "told to fail" in said and TOKEN not in said
    assert not [line for line in said.splitlines() if line.lstrip().startswith("::")]
    assert all(TOKEN not in data.decode("latin-1") for data in hub.repos[TARGET].main.values())


def test_bad_files(hub: Hub, file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / file.name
    damaged.write_bytes(file.read_bytes())
    with damaged.open("r+b") as out:
        out.seek(1000)
        out.write(b"\xff\xff\xff")
    with pytest.raises(BadDigest):
        bundle(damaged)
    odd = tmp_path / "a b.hlwq"
    odd.write_bytes(file.read_bytes())
    with pytest.raises(Usage, match="has a plain name"):
        bundle(odd)
    with pytest.raises(Usage, match="is no repository: expected org/name"):
        bundle(file, "org/name@main")
    twin = tmp_path / "sub" / "TINY-5.hlwq"
    twin.parent.mkdir()
    twin.write_bytes(file.read_bytes())
    with pytest.raises(Usage, match="the same name"):
        make_bundle([file, twin], TARGET, [])
    assert hub.seen == []


def test_files_of_different_models(file: Path, converted: Path) -> None:
    with pytest.raises(Usage, match=r"small.hlwq and tiny-5.hlwq are of different models: LICENSE differs"):
        make_bundle([converted, file], TARGET, [])


def test_the_command_of_the_card_makes_the_same_file(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add("org/tiny", model_files(model))
    options = ["--recipe", "uniform", "--set", r"layers\.0\..*down_proj=4", "--set", r"(k_proj|`v_proj)=raw"]
    out = tmp_path / "rules.hlwq"
    assert run("convert", "org/tiny", out, *options).returncode == 0
    card = next(item.content for item in bundle(out).items if item.path == "README.md")
    assert isinstance(card, bytes)
    command = re.search(r"```\nhlwq-convert (.*)\n```", card.decode())
    assert command is not None
    origin, name, *rest = shlex.split(command[1])
    assert name == "rules.hlwq"
    assert run("convert", origin, tmp_path / "again.hlwq", *rest).returncode == 0
    assert (tmp_path / "again.hlwq").read_bytes() == out.read_bytes()


def test_items_are_what_was_verified(hub: Hub, file: Path) -> None:
    """A file that changes between the check and the upload is caught by the comparison."""
    made = bundle(file)
    items = [replace(item, sha256="0" * 64) if item.path == file.name else item for item in made.items]
    with pytest.raises(HubMismatch):
        publish(replace(made, items=items))


def test_a_real_model(hub: Hub, tmp_path: Path) -> None:
    """SmolLM2-135M: pushed, downloaded, and every tensor loaded with the same bits."""
    model = real_model("SmolLM2-135M-Instruct")
    torch = pytest.importorskip("torch")
    from huggingface_hub import hf_hub_download

    out = tmp_path / "smollm2-5.hlwq"
    h.convert(model, out)
    publish(bundle(out, "org/SmolLM2-HLWQ"))
    fetched = hf_hub_download("org/SmolLM2-HLWQ", out.name)
    there, here = h.load_state_dict(fetched), h.load_state_dict(out)
    assert len(there) == 272 and list(there) == list(here)
    for name, tensor in there.items():
        assert torch.equal(tensor.view(torch.int16), here[name].view(torch.int16)), name


# --- split sets -------------------------------------------------------------------------------------


def split(model: Path, out: Path, size: int) -> list[Path]:
    h.convert(model, out, split_size=size, overwrite=True)
    return sorted(out.parent.glob(f"{out.stem}*.hlwq"))


def test_a_set_is_pushed_whole_and_loads_by_the_card(hub: Hub, model: Path, converted: Path, tmp_path: Path) -> None:
    parts = split(model, tmp_path / "tiny.hlwq", 60_000)
    assert len(parts) == 3
    done = run("push", *parts, TARGET)  # as a shell makes it of tiny-*.hlwq
    assert done.returncode == 0, done.stderr
    repo = hub.repos[TARGET]
    assert len(repo.commits) == 2
    assert {name: repo.main[name] for name in repo.main if name.endswith(".hlwq")} == {
        part.name: part.read_bytes() for part in parts
    }
    card = repo.main["README.md"].decode()
    total = sum(part.stat().st_size for part in parts)
    assert f"| tiny.hlwq, in 3 parts | {total / 1000:.1f} kB |" in card
    assert "hlwq-convert MODEL_DIR tiny.hlwq --bits 5 --split-size 60000" in card
    assert [f["file_bytes"] for f in json.loads(repo.main["report.json"])["files"]] == [total]
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippet is not None
    pytest.importorskip("torch")
    import torch

    ran = subprocess.run(
        [sys.executable, "-c", f"{snippet[1]}\nimport torch\ntorch.save(state_dict, {str(tmp_path / 'state')!r})"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    found, expected = torch.load(tmp_path / "state"), h.load_state_dict(converted)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    hub.seen.clear()
    assert "nothing was pushed" in run("push", tmp_path / "tiny.hlwq", TARGET).stdout
    assert hub.paths("PUT") == []


def test_a_set_replaces_what_was_cut_otherwise(hub: Hub, model: Path, tmp_path: Path) -> None:
    for size, count in ((10**6, 1), (60_000, 3), (40_000, 4), (10**6, 1)):
        parts = split(model, tmp_path / "tiny.hlwq", size)
        assert len(parts) == count
        assert publish(make_bundle([tmp_path], TARGET, [])).changed
        main = hub.repos[TARGET].main
        assert sorted(name for name in main if name.endswith(".hlwq")) == [part.name for part in parts]


def test_an_incomplete_set_is_not_pushed(hub: Hub, model: Path, tmp_path: Path) -> None:
    parts = split(model, tmp_path / "tiny.hlwq", 60_000)
    parts[1].unlink()
    done = run("push", parts[0], TARGET)
    assert done.returncode == 66
    assert f"{parts[1].name}: part 2 of 3 is missing" in done.stderr
    assert TARGET not in hub.repos
