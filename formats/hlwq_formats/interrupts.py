"""Changes of a file's state that no signal handler cuts in two.

Python runs signal handlers in its main thread between instructions: after a call, at the beginning of a function, at
the end of a round of a loop. One that raises there, as Ctrl-C does, between the creation of a file and the statement
that sees to its removal, would leave the file behind. So a writer puts a `Gate` before each handler: while a function
marked `uninterrupted` is running, signals wait, and are handled when it returns.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
Handler = Callable[[int, FrameType | None], Any]

_UNINTERRUPTED: set[CodeType] = set()
_waiting: list[tuple[Handler, int]] = []


class Gate:
    """Stands before a handler, and lets no signal pass into an uninterrupted function."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """What Python calls when the signal came."""
        if not _is_uninterrupted(frame):
            self.handler(number, frame)
        elif (self.handler, number) not in _waiting:  # like the kernel's, a signal that waits does so once
            _waiting.append((self.handler, number))


def _is_uninterrupted(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _UNINTERRUPTED:
            return True
        frame = frame.f_back
    return False


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """Let no signal handler run in this function, from its first instruction to its last, while gates are set. What
    waited runs at the end of the outermost such function, and may raise there instead of its result."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:  # nothing is called after the last look at what waits, so nothing more can come
            while _waiting and _may_handle(sys._getframe(1)):
                handler, number = _waiting.pop(0)
                handler(number, sys._getframe(1))

    _UNINTERRUPTED.add(cast(FunctionType, run).__code__)
    return run


def _may_handle(caller: FrameType) -> bool:
    return threading.current_thread() is threading.main_thread() and not _is_uninterrupted(caller)


def set_gates(gates: dict[int, Gate]) -> None:
    """Put a gate before each handler that is written in Python and has none, and note it in `gates`; in other threads
    than the main one, where no handler runs, do nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, Gate):
                gates[number] = Gate(handler)
                signal.signal(number, gates[number])


def lift_gates(gates: dict[int, Gate]) -> None:
    """Give the signals back their handlers, where no other was set since, also when one of these raises meanwhile. If
    two do, gates may stay: outside of uninterrupted functions they only pass signals on."""
    try:
        _lift(gates)
    except BaseException:
        _lift(gates)
        raise


def _lift(gates: dict[int, Gate]) -> None:
    for number, gate in gates.items():
        if isinstance(signal.getsignal(number), Gate):
            signal.signal(number, gate.handler)
