"""hlwq-requantize: the whole job against the loopback Hub.

hlwq-eval is stood in for by a script that prints numbers of its own, since that command is not part of this package
yet: what is tested is what is asked of it and what is done with its answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_client import LIBRARY_WARNING, hub, model_files, run
from hub_server import Hub, Repo
from models import small_model

import hlwq_convert as h
from hlwq_convert.hub.card import Container, front_matter
from hlwq_convert.hub.evaluation import Evaluation
from hlwq_convert.hub.gates import check
from hlwq_convert.hub.job import Gates, parse_size, read_job
from hlwq_convert.hub.requantize import HANDOVER, Result, publish_handed, requantize
from hlwq_convert.hub.summary import summarize, summarize_error
from hlwq_formats.errors import BadDigest, BadEvaluation, IoFailure, MissingInput, Usage

__all__ = ["hub"]
pytestmark = pytest.mark.filterwarnings(LIBRARY_WARNING)

BASE, TARGET = "org/tiny", "org/tiny-HLWQ"
JOB = f"""
[base]
repo = "{BASE}"

[target]
repo = "{TARGET}"
tag = "base-{{commit}}"

[[file]]
name = "tiny-5.hlwq"
[file.gates]
min_cosine = 0.998
max_size = "150 kB"

[[file]]
name = "tiny-4.hlwq"
bits = 4
set = ['down_proj=5']
"""
EVALUATION = "\n[evaluation]\ntext = 'text.txt'\nctx = 64\n"


@pytest.fixture
def base(hub: Hub, model: Path) -> Repo:
    return hub.add(BASE, model_files(model))


def write_job(folder: Path, text: str = JOB) -> Path:
    (folder / "text.txt").write_text("It was a dark and stormy night.\n")
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def do(folder: Path, text: str = JOB, *, dry_run: bool = False) -> Result:
    return requantize(read_job(write_job(folder, text)), folder / "work", lambda *_: None, dry_run=dry_run)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, kl: float = 0.01, content: str | None = None) -> Path:
    """Put a hlwq-eval on the path that prints fixed numbers, and notes how it was called."""
    calls = folder / "calls"
    tool = folder / "bin" / "hlwq-eval"
    tool.parent.mkdir()
    tool.write_text(
        f"#!{sys.executable}\nimport json, sys\nimport hlwq_convert as h\n"
        f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        f"content = {content!r} or h.inspect(sys.argv[1]).content_id\n"
        f"quality = {{'perplexity': 12.5, 'perplexity_ratio': 1.004, 'kl_mean': {kl}, 'kl_p99': 0.2, 'more': [1]}}\n"
        "source = {'kind': 'source', 'quality': quality}\n"
        "entries = [source, {'kind': 'hlwq', 'content_id': content, 'quality': quality}]\n"
        "print(json.dumps({'text': 'a stormy night', 'ctx': int(arguments['--ctx']), 'entries': entries}))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr("hlwq_convert.hub.evaluate.find_tool", lambda: os.fspath(tool))
    return calls


def test_the_whole_job(hub: Hub, base: Repo, tmp_path: Path, model: Path) -> None:
    job, summary = write_job(tmp_path), tmp_path / "summary.md"
    done = run("requantize", job, "--work", tmp_path / "work", "--summary", summary, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    target = hub.repos[TARGET]
    commit = base.refs["refs/heads/main"]
    assert found["state"] == "published" and found["outcome"]["changed"] is True
    assert target.refs[f"refs/tags/base-{commit[:12]}"] == found["outcome"]["commit"] == target.refs["refs/heads/main"]
    for name in ("tiny-5.hlwq", "tiny-4.hlwq"):
        assert target.main[name] == (tmp_path / "work" / name).read_bytes()
        assert h.inspect(tmp_path / "work" / name).metadata.source.revision == commit
    assert front_matter(target.main["README.md"])["license"] == "apache-2.0"
    assert target.main["README.md"] == (tmp_path / "work" / "README.md").read_bytes()
    text = summary.read_text()
    assert "| tiny-5.hlwq | min_cosine | 0.998000 | 0.99" in text and "| passed |" in text and "published" in text
    # nothing changed: nothing is done
    hub.seen.clear()
    again = run("requantize", job, "--work", tmp_path / "other", "--json")
    assert json.loads(again.stdout)["state"] == "unchanged" and not (tmp_path / "other").exists()
    assert hub.paths("PUT") == [] and hub.paths("POST") == []
    assert not [path for path in hub.paths("GET") if path.endswith(".safetensors")]
    # a tag that is missing is set, from what was made before
    tag = target.refs.pop(f"refs/tags/base-{commit[:12]}")
    assert do(tmp_path).state == "published" and target.refs[f"refs/tags/base-{commit[:12]}"] == tag
    # the card of the base changed: still nothing
    base.commit({**base.main, "README.md": b"# new words\n"}, "refs/heads/main")
    assert do(tmp_path).state == "unchanged"
    # its weights changed: a new commit and a new tag, the old tag where it was
    other = small_model(tmp_path / "other-model", seed=1)
    base.commit({**base.main, **{path.name: path.read_bytes() for path in other.iterdir()}}, "refs/heads/main")
    result = do(tmp_path)
    assert result.state == "published" and len(target.commits) == 3
    assert target.refs[f"refs/tags/base-{commit[:12]}"] != target.refs["refs/heads/main"]
    assert target.refs[f"refs/tags/base-{result.commit[:12]}"] == target.refs["refs/heads/main"]


def test_other_options_are_a_change(hub: Hub, base: Repo, tmp_path: Path) -> None:
    assert do(tmp_path, JOB.replace("tag =", "#")).state == "published"
    assert do(tmp_path, JOB.replace("tag =", "#")).state == "unchanged"
    assert do(tmp_path, JOB.replace("tag =", "#").replace("down_proj=5", "down_proj=raw")).state == "published"


def test_two_jobs_and_a_digest(hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made without a token, published with one."""
    token = os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    result = do(tmp_path, dry_run=True)
    assert (result.state, result.outcome) == ("ready", None) and TARGET not in hub.repos
    assert all(authorization is None for _, _, authorization in hub.seen)
    monkeypatch.setenv("HF_TOKEN", token)
    work, job = tmp_path / "work", tmp_path / "job.toml"
    done = run("requantize", job, "--work", work, "--publish", str(result.digest), "--json")
    assert done.returncode == 0, done.stderr
    assert hub.repos[TARGET].main["tiny-4.hlwq"] == (work / "tiny-4.hlwq").read_bytes()


@pytest.mark.parametrize("name", ["tiny-4.hlwq", HANDOVER, "evaluation"])
def test_what_was_swapped_is_not_published(
    hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stand_in(tmp_path, monkeypatch)
    result = do(tmp_path, JOB + EVALUATION, dry_run=True)
    work = tmp_path / "work"
    path = next(work.glob("tiny-4.*.evaluation.json")) if name == "evaluation" else work / name
    before = path.read_bytes()
    if name == "tiny-4.hlwq":  # a good file, but another one
        h.convert(small_model(tmp_path / "m"), path, overwrite=True)
    else:
        path.write_bytes(before.replace(b"0.2", b"0.1").replace(b"tiny-4", b"tiny-5"))
    assert path.read_bytes() != before
    with pytest.raises(BadDigest, match="handed over"):
        publish_handed(work, str(result.digest), read_job(tmp_path / "job.toml"))
    assert TARGET not in hub.repos


def test_the_side_that_publishes_trusts_its_own_job_file(hub: Hub, base: Repo, tmp_path: Path) -> None:
    digest = str(do(tmp_path, dry_run=True).digest)
    work = tmp_path / "work"
    strict = read_job(write_job(tmp_path, JOB.replace("0.998", "0.9999")))
    assert publish_handed(work, digest, strict).state == "stopped"
    other = read_job(write_job(tmp_path, JOB.replace("tiny-4", "other-4")))
    with pytest.raises(Usage, match="was made by a job with other files"):
        publish_handed(work, digest, other)
    for document in (b"[1]", b'{"containers":[{"name":"../job.toml","sha256":""}],"evaluations":[]}'):
        (work / HANDOVER).write_bytes(document)
        with pytest.raises(BadDigest, match=r"is no hand-over|job\.toml: is not the file"):
            publish_handed(work, hashlib.sha256(document).hexdigest(), strict)
    assert TARGET not in hub.repos


@pytest.mark.parametrize("gate", ["min_cosine = 0.9995", 'max_size = "100kB"'])
def test_a_gate_that_fails(hub: Hub, base: Repo, tmp_path: Path, gate: str) -> None:
    job = write_job(tmp_path, JOB.replace("min_cosine = 0.998", gate).replace('max_size = "150 kB"', ""))
    summary = tmp_path / "summary.md"
    done = run("requantize", job, "--work", tmp_path / "work", "--summary", summary)
    assert done.returncode == 1
    assert f"hlwq: tiny-5.hlwq: {gate.split()[0]} is " in done.stderr
    assert "stopped by a gate; nothing was published" in summary.read_text() and "**failed**" in summary.read_text()
    assert TARGET not in hub.repos and not (tmp_path / "work" / HANDOVER).exists()


def test_evaluation(hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(tmp_path, monkeypatch)
    text = JOB.replace("min_cosine = 0.998", "max_kl = 0.02\nmax_perplexity_ratio = 1.01") + EVALUATION
    result = do(tmp_path, text)
    assert result.state == "published"
    (line, _) = calls.read_text().splitlines()
    file, _, against, *rest = line.split()
    assert file == str(tmp_path / "work" / "tiny-5.hlwq") and Path(against).name == result.commit
    assert rest == ["--ctx", "64", "--json", "--text", str(tmp_path / "text.txt")]
    card = hub.repos[TARGET].main["README.md"].decode()
    assert "| tiny-5.hlwq | a stormy night | 64 | 12.5000 | 1.00400 | 0.010000 | 0.200000 |" in card
    hub.repos.pop(TARGET)
    assert do(tmp_path, text).state == "published" and len(calls.read_text().splitlines()) == 2  # it was kept
    (tmp_path / "text.txt").write_text("another text")
    hub.repos.pop(TARGET)
    requantize(read_job(tmp_path / "job.toml"), tmp_path / "work", lambda *_: None)
    assert len(calls.read_text().splitlines()) == 4


def test_output_that_is_too_far(hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, kl=0.03)
    result = do(tmp_path, JOB.replace("min_cosine = 0.998", "max_kl = 0.02") + EVALUATION)
    assert result.state == "stopped" and TARGET not in hub.repos
    assert [(c.gate, c.found, c.good) for c in result.checks if not c.good] == [("max_kl", 0.03, False)]


def test_an_answer_about_another_file(hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, content="0" * 64)
    with pytest.raises(BadEvaluation, match="is of content 0000"):
        do(tmp_path, JOB + EVALUATION)
    assert TARGET not in hub.repos


def test_without_the_evaluator(hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(Usage, match="hlwq-eval is not installed"):
        do(tmp_path, JOB + EVALUATION)
    assert not [path for path in hub.paths("GET") if path.endswith(".safetensors")]


def test_an_evaluator_that_fails(hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(tmp_path, monkeypatch)
    (calls.parent / "bin" / "hlwq-eval").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(IoFailure, match="hlwq-eval ended with status 3"):
        do(tmp_path, JOB + EVALUATION)


def test_a_job_that_was_stopped_goes_on(hub: Hub, base: Repo, tmp_path: Path) -> None:
    hub.fail("POST", "/api/repos/create", 403)
    with pytest.raises(h.HlwqError, match="403"):
        do(tmp_path)
    made = tmp_path / "work" / "tiny-5.hlwq"
    before, bits = made.stat(), (tmp_path / "work" / "tiny-4.hlwq")
    bits.write_bytes(bits.read_bytes()[:-1])  # half a file is made again
    assert do(tmp_path).state == "published"
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_full_disk_is_noticed_before_anything_is_fetched(
    hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def full(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 10  # free blocks
        values[1] = 1024
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(IoFailure, match=r"kB are needed to fetch the model, 10.2 kB are free"):
        do(tmp_path)
    assert not [path for path in hub.paths("GET") if path.endswith(".safetensors")]


def test_too_little_memory_to_evaluate(hub: Hub, base: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(IoFailure, match=r"the evaluation holds 372.7 kB of weights, this machine has 10.0 kB"):
        do(tmp_path, JOB + EVALUATION)
    assert not list((tmp_path / "work").glob("*.hlwq"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[base", "not a job"),
        (JOB.replace("[target]", "[targets]"), "not a job"),
        (JOB.replace(f'"{BASE}"', '"just-a-name"'), "is no repository"),
        (JOB.replace("tiny-4", "tiny 4"), "has a plain name"),
        (JOB.replace("tiny-4", "Tiny-5"), "the same name"),
        (JOB.replace("bits = 4", "bits = 9"), "expected 2 to 8"),
        (JOB.replace("bits = 4", "bits = 4\nrecipe = 'mixed'"), "exclude each other"),
        (JOB.replace("bits = 4", "effort = 'most'"), "effort is most"),
        (JOB.replace("150 kB", "150 KiB"), "is no size"),
        (JOB.replace("min_cosine", "max_kl"), "its gates need an"),
        (JOB.split("[[file]]")[0] + "file = []", "not a job"),
        (JOB.replace("bits = 4", "secret = 1"), "not a job"),
    ],
)
def test_bad_jobs(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(Usage, match=expected) as caught:
        read_job(write_job(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_paths_of_a_job_are_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours.toml").write_text("default = 6\n")
    job = read_job(write_job(tmp_path, JOB.replace("bits = 4", "recipe = 'ours.toml'") + EVALUATION))
    assert job.file[1].recipe == str(tmp_path / "ours.toml")
    assert job.evaluation is not None and job.evaluation.text == str(tmp_path / "text.txt")
    with pytest.raises(MissingInput, match="no such recipe"):
        read_job(write_job(tmp_path, JOB.replace("bits = 4", "recipe = 'none.toml'")))


@pytest.mark.parametrize(("text", "size"), [("5", 5), ("4.2GB", 4_200_000_000), ("1 kB", 1000), ("0.5 MB", 500_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_gates(converted: Path) -> None:
    inspection = h.inspect(converted)
    output = Evaluation(str(inspection.content_id), "t", 64, 10.0, 1.02, 0.05, 0.2)
    worst = inspection.summary.cosine_min
    assert worst is not None

    def passed(output: Evaluation | None, **gates: Any) -> list[bool]:
        return [one.good for one in check(Container("f", inspection, output), Gates(**gates))]

    assert passed(None) == []
    assert passed(None, min_cosine=worst) == [True] and passed(None, min_cosine=worst + 1e-9) == [False]
    assert passed(output, max_kl=0.05, max_perplexity_ratio=1.02) == [True, True]
    assert passed(output, max_kl=0.0499, max_perplexity_ratio=1.0199) == [False, False]
    assert passed(None, max_kl=1e9, max_perplexity_ratio=1e9) == [False, False]  # what was not measured fails
    size = inspection.file_bytes
    assert passed(None, max_size=f"{size}B") == [True] and passed(None, max_size=f"{size - 1}B") == [False]


def test_summaries_are_harmless() -> None:
    result = Result("org/x", "ab" * 20, "unchanged", warnings=["::error::<script>|\n# x"])
    assert "Warning: &#92;x3a:error:&#58;&#60;script&#62;&#124;&#92;n&#35; x" in summarize(result)
    assert "::" not in summarize_error(IoFailure("::stop-commands::x", file="::add-mask::f"))


SPLIT_JOB = f"""
[base]
repo = "{BASE}"
[target]
repo = "{TARGET}"
[[file]]
name = "tiny.hlwq"
split_size = "60 kB"
[file.gates]
max_size = "150 kB"
"""


def test_a_split_file(hub: Hub, base: Repo, tmp_path: Path) -> None:
    """Converted, gated by the sum of its parts, handed over, published, and found again, as one."""
    result = do(tmp_path, SPLIT_JOB, dry_run=True)
    work = tmp_path / "work"
    parts = sorted(path.name for path in work.glob("*.hlwq"))
    assert parts == [f"tiny-0000{i}-of-00003.hlwq" for i in (1, 2, 3)]
    sizes = sum((work / part).stat().st_size for part in parts)
    assert [(one.gate, one.found, one.good) for one in result.checks] == [("max_size", sizes, True)]
    made = {part: (work / part).stat().st_mtime_ns for part in parts}
    result = do(tmp_path, SPLIT_JOB)
    assert result.state == "published"
    assert made == {part: (work / part).stat().st_mtime_ns for part in parts}
    main = hub.repos[TARGET].main
    assert {name for name in main if name.endswith(".hlwq")} == set(parts)
    assert do(tmp_path, SPLIT_JOB).state == "unchanged"
    assert do(tmp_path, SPLIT_JOB.replace("150 kB", "100 kB").replace("tiny.hlwq", "t.hlwq")).state == "stopped"


def test_parts_that_were_swapped_are_not_published(hub: Hub, base: Repo, tmp_path: Path) -> None:
    """A hand-over that does not list all parts of a set vouches for none of them."""
    job = read_job(write_job(tmp_path, SPLIT_JOB))
    work = tmp_path / "work"
    requantize(job, work, lambda *_: None, dry_run=True)
    document = json.loads((work / HANDOVER).read_bytes())
    document["containers"] = document["containers"][:2]
    (work / HANDOVER).write_text(json.dumps(document))
    digest = hashlib.sha256((work / HANDOVER).read_bytes()).hexdigest()
    with pytest.raises(BadDigest, match="some parts of a set are not those that were handed over"):
        publish_handed(work, digest, job)
    assert TARGET not in hub.repos
