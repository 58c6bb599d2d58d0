"""What the commands share: one way to fail, to be interrupted and to show progress."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import rich_click as click
from click.exceptions import Exit

from hlwq_formats.errors import HlwqError, Internal, IoFailure, Usage, escape


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that what was begun is cleaned up or left to be resumed."""


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--quiet, --debug and --version."""
    from .. import __version__

    for option in (
        click.version_option(__version__, package_name="hlwq-convert", message="%(prog)s %(version)s"),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors (and --json)."),
    ):
        command = option(command)
    return command


def run_command(command: click.Command, program: str) -> NoReturn:
    """Run a command and exit with the status of DESIGN: one line on stderr for whatever went wrong."""
    _handle_signals(_interrupt)
    _repair_streams()
    debug = "--debug" in sys.argv[1:]
    try:
        # not command.main(), which prints a line of its own when interrupted
        with command.make_context(program, sys.argv[1:]) as context:
            status = command.invoke(context)
        sys.stdout.flush()
    except Exit as done:  # --help and --version
        status = done.exit_code
    except KeyboardInterrupt:
        status = _fail("hlwq: interrupted", 130)
    except _Terminated as ended:
        status = _fail("hlwq: terminated", 128 + ended.args[0])
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 141
    except click.ClickException as error:
        hint = f"see {program} --help"
        status = _report(Usage(escape(error.format_message().replace("\n", " ").rstrip("."), 300), hint=hint), debug)
    except HlwqError as error:
        status = _report(error, debug)
    except OSError as error:
        file = error.filename if isinstance(error.filename, str) else None
        status = _report(IoFailure(error.strerror or str(error), file=file), debug)
    except MemoryError:
        status = _report(IoFailure("out of memory", hint="use fewer --workers"), debug)
    except Exception as error:  # whatever is left is a bug of ours, and a user still gets one line
        if "can't start new thread" in str(error):
            sys.exit(_report(IoFailure("out of memory for a thread", hint="use fewer --workers"), debug))
        problem = f"internal error: {type(error).__name__}: {escape(str(error))}"
        status = _report(Internal(problem, hint="please report it with the output of --debug"), debug)
    ignore_signals()  # all is done: a signal now must not turn it into a traceback
    sys.exit(status if isinstance(status, int) else 0)


def _handle_signals(handler: Any) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def ignore_signals() -> None:
    """Let no signal interrupt any more."""
    _handle_signals(signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()  # a second one must not interrupt the clean-up
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise _Terminated(number)


def _report(error: HlwqError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    return _fail(f"hlwq: error[HLWQ-{error.code}]: {error}", error.exit_status)


def _fail(line: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed: the status must do
        print(line, file=sys.stderr, flush=True)
    return status


def _repair_streams() -> None:
    """Give a closed standard stream to the null device, before a file of ours takes its number, and let no
    character be unprintable."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(document: Any) -> None:
    """One JSON document on stdout, in UTF-8 whatever the locale says."""
    import msgspec

    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.encode(document) + b"\n")
    sys.stdout.buffer.flush()


def print_warnings(messages: list[str], *, quiet: bool) -> None:
    """One line on stderr for each warning, unless only errors are asked for."""
    for message in () if quiet else messages:
        print(f"hlwq: warning: {message}", file=sys.stderr)


class ProgressLine:
    """Bytes (or what `unit` counts) done, rate and time left on stderr: a bar in a terminal, else a line every ten
    seconds."""

    def __init__(self, *, quiet: bool, unit: str = "bytes") -> None:
        self._quiet = quiet
        self._unit = unit
        self._stage = ""
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `done` of `total` bytes of a stage are done; a total of 0 announces the stage alone."""
        if self._quiet:
            return
        if total == 0:
            print(f"hlwq: {stage} ...", file=sys.stderr)
            return
        if stage != self._stage:
            self._stage, self._began, self._said = stage, time.monotonic(), time.monotonic()
            if sys.stderr.isatty():
                self._start_bar(stage, total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif (now := time.monotonic()) - self._said >= 10:
            self._said = now
            rate = done / (now - self._began)
            left = (total - done) / rate if rate else 0
            speed = f"{rate / 1e6:.0f} MB/s" if self._unit == "bytes" else f"{rate:.3g} {self._unit}/s"
            print(f"hlwq: {stage} {100 * done // max(total, 1)} %, {speed}, {left:.0f} s left", file=sys.stderr)

    def _start_bar(self, stage: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                *((DownloadColumn(), TransferSpeedColumn()) if self._unit == "bytes" else (MofNCompleteColumn(),)),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        self._task = self._bar.add_task(stage, total=total)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
