"""What every test file may use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models import small_model

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    """The one marker of these tests."""
    config.addinivalue_line("markers", "once: slow, and about processes or the system; scripts/test runs it once")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sharded llama-like model; tests must not change it."""
    return small_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="session")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 5 bits; tests must not change it."""
    import hlwq_convert as h

    out = tmp_path_factory.mktemp("converted") / "small.hlwq"
    h.convert(model, out)
    return out


@pytest.fixture
def run_tool() -> Run:
    """Run `convert` or `inspect` as a user does, in a process of its own."""

    def run(tool: str, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        code = f"from hlwq_convert.cli.{tool} import main; main()"
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **(env or {})},
        )

    return run
