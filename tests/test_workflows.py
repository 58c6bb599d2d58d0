"""The CI files of this repository: what linters say, and the rules that keep a stranger's model from a credential."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ALL = [*WORKFLOWS, ROOT / "action.yml"]


def read(path: Path) -> dict[Any, Any]:
    found = yaml.load(path.read_text(), Loader=yaml.BaseLoader)  # as GitHub reads it: `on` is no boolean
    assert isinstance(found, dict)
    return found


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(path)["jobs"]
    return found


def steps() -> list[tuple[str, dict[str, Any]]]:
    found = [(path.name, step) for path in WORKFLOWS for job in jobs(path).values() for step in job["steps"]]
    return [*found, *(("action.yml", step) for step in read(ROOT / "action.yml")["runs"]["steps"])]


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_zizmor() -> None:
    tool = Path(sys.executable).with_name("zizmor")
    done = run(str(tool), "--offline", "--no-progress", "--strict-collection", ".github/workflows", "action.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint() -> None:
    tool = shutil.which("actionlint")
    if tool is None:
        pytest.skip("actionlint is not installed")
    done = run(tool, *map(str, WORKFLOWS))
    assert done.returncode == 0, done.stdout


def test_there_are_three_and_an_action() -> None:
    assert [path.name for path in ALL] == ["ci.yml", "release.yml", "requantize.yml", "action.yml"]


def test_nothing_is_spliced_into_a_script() -> None:
    scripts = [(name, step["run"]) for name, step in steps() if "run" in step]
    assert len(scripts) >= 5
    assert [name for name, script in scripts if "${{" in script] == []


def test_actions_are_pinned() -> None:
    used = {step["uses"] for _, step in steps() if "uses" in step} - {"./"}
    assert len(used) == 6
    assert [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []
    for path in ALL:  # the version stands beside each hash
        assert re.findall(r"@[0-9a-f]{40}(?! # v\d)", path.read_text()) == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: str(path.name))
def test_permissions(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {}
    assert "pull_request_target" not in workflow["on"] and "workflow_run" not in workflow["on"]
    text = path.read_text()
    assert "secrets." not in text and "cache:" not in text
    for name, job in jobs(path).items():
        allowed = {"contents": "read"}
        if name == "publish":
            assert job["environment"] in ("hub", "pypi") and job["needs"]
            allowed |= {"id-token": "write", "attestations": "write"}
        assert job["permissions"].items() <= allowed.items(), name
        assert "timeout-minutes" in job
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] == "false"


def test_a_model_is_converted_without_credentials_and_handed_over_by_digest() -> None:
    requantize = jobs(ROOT / ".github" / "workflows" / "requantize.yml")
    convert, publish = requantize["convert"], requantize["publish"]
    assert convert["permissions"] == {"contents": "read"} and "HF_" not in str(convert)
    (ours,) = [step for step in publish["steps"] if step.get("uses") == "./"]
    assert ours["with"]["publish"] == "${{ needs.convert.outputs.digest }}"
    assert ours["env"] == {"HF_OIDC_RESOURCE": "${{ inputs.target || vars.HLWQ_TARGET }}"}
    assert all("HF_OIDC_RESOURCE" not in str(step) for step in publish["steps"] if step is not ours)


def test_the_action_runs_what_its_inputs_say(tmp_path: Path) -> None:
    """Its script, with inputs that would do harm if they were code, against a stand-in for the command."""
    action = read(ROOT / "action.yml")
    (step,) = [step for step in action["runs"]["steps"] if step.get("id") == "run"]
    assert step["env"] == {
        "JOB": "${{ inputs.job }}", "WORK": "${{ inputs.work }}", "DRY_RUN": "${{ inputs.dry-run }}",
        "PUBLISH": "${{ inputs.publish }}",
    }  # fmt: skip
    commands = tmp_path / "hlwq" / "bin"
    commands.mkdir(parents=True)
    (commands / "python").symlink_to(sys.executable)
    (commands / "hlwq-requantize").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\necho \'{{"state": "ready", "digest": "abc"}}\'\n'
    )
    (commands / "hlwq-requantize").chmod(0o755)
    hostile = "--x; touch harm; $(touch harm)\n::error::"
    inputs = {"JOB": hostile, "WORK": "a b", "DRY_RUN": "true", "PUBLISH": "", "PATH": "/usr/bin:/bin"}
    runner = {"RUNNER_TEMP": str(tmp_path), "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": "summary"}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    subprocess.run(command, env={**inputs, **runner}, cwd=tmp_path, check=True, timeout=60)
    found = (tmp_path / "arguments").read_text()
    assert found == f"--work\na b\n--summary\nsummary\n--json\n--dry-run\n--\n{hostile}\n"
    assert (tmp_path / "output").read_text() == "state=ready\ndigest=abc\n"
    assert not (tmp_path / "harm").exists()
