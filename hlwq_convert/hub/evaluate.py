"""The seam to hlwq-eval: one file against its source, as the document that it prints."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hlwq_formats.errors import BadEvaluation, IoFailure, Usage, escape

from .bundle import hash_file
from .evaluation import read_evaluation
from .job import EvaluationJob


def find_tool() -> str:
    """The command hlwq-eval, beside this Python or on the path; Usage when it is not installed."""
    tool = shutil.which(
        "hlwq-eval", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    )
    if tool is None:
        raise Usage(
            "the job has an [evaluation], and hlwq-eval is not installed",
            hint="install a version of hlwq-convert that has it, or leave out [evaluation]",
        )
    return tool


def evaluate(file: Path, content_id: str, model: Path, job: EvaluationJob) -> Path:
    """Measure `file` against the model that it was made from; the path of the document.

    It stands beside the file, named by what was measured on what, and is not made again.
    """
    text = hash_file(Path(job.text)) if job.text is not None else "built in"
    key = hashlib.sha256(f"{content_id} {text} {job.ctx}".encode()).hexdigest()[:16]
    out = file.with_name(f"{file.stem}.{key}.evaluation.json")
    if not out.exists():
        command = [find_tool(), os.fspath(file), "--against", os.fspath(model), "--ctx", str(job.ctx), "--json"]
        if job.text is not None:
            command += ["--text", job.text]
        done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise IoFailure(f"hlwq-eval ended with status {done.returncode}", file=file.name)
        part = out.with_name(out.name + ".part")
        part.write_bytes(done.stdout)
        read_evaluation(part)
        part.replace(out)
    found = read_evaluation(out)
    if (found.content_id, found.ctx) != (content_id, job.ctx):
        raise BadEvaluation(f"is of content {escape(found.content_id, 40)} and {found.ctx} tokens", file=out.name)
    return out
