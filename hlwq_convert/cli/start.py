"""Where the commands start: until there is anything to clean up, a signal just ends the process."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"hlwq: interrupted\n" if number == signal.SIGINT else b"hlwq: terminated\n")
    os._exit(128 + number)


for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if hasattr(signal, _name):
        signal.signal(getattr(signal, _name), _end)


def convert() -> NoReturn:
    """hlwq-convert."""
    from .convert import main

    main()


def inspect() -> NoReturn:
    """hlwq-inspect."""
    from .inspect import main

    main()


def run() -> NoReturn:
    """hlwq-run."""
    from .run import main

    main()


def push() -> NoReturn:
    """hlwq-push."""
    from .push import main

    main()


def requantize() -> NoReturn:
    """hlwq-requantize."""
    from .requantize import main

    main()


def evaluate() -> NoReturn:
    """hlwq-eval."""
    from .eval import main

    main()
