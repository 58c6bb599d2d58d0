"""The real huggingface_hub, in this process or a child, against the loopback Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants

from hlwq_convert.hub.client import hide_progress

LIBRARY_WARNING = "ignore:Use 'content=<...>' to upload"  # of httpx2 about huggingface_hub, not ours to mend


def model_files(
    folder: Path, card: bytes = b"---\nlicense: apache-2.0\nlanguage: [no, en]\n---\n# A model\n"
) -> dict[str, bytes]:
    """The files of a model as a repository holds them, with a card and things that nobody needs."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = {"README.md": card, "pytorch_model.bin": b"never", "onnx/model.safetensors": b"never", "run.py": b"never"}
    return {**files, **extra, "consolidated.safetensors": b"never"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running Hub that this process and its children talk to, with an empty cache and a token."""
    home = tmp_path / "hf-home"
    with Hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in {
            "HF_ENDPOINT": running.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        hide_progress()
        yield running
        huggingface_hub.close_session()


def run(tool: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in a process of its own that reads HF_ENDPOINT."""
    code = f"from hlwq_convert.cli.{tool} import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", LIBRARY_WARNING, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )
