"""What ends a process before its work is done: signals, which wait until it is whole, and errors to be expected."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
"""What ends a command with a sentence: mistakes of the user, files and the network, a run that diverged."""
_ENDING = (signal.SIGTERM, signal.SIGINT)
# Launchers pass on a Ctrl-C that their processes have got from the terminal already.
_ONE_PRESS = 2.0


def _leave(number: int, frame: FrameType | None = None) -> NoReturn:
    """Python's answer to SIGINT, and the like for SIGTERM, which by itself would leave no time to tidy up."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def unwind_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: files are closed, helpers stopped, the exit status is 143."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)


def deaf_worker(initialize: Callable[[int], None] | None, number: int) -> None:
    """Start a worker of a data loader, which ends when its loader says so: launchers send signals to workers, too."""
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    if initialize is not None:
        initialize(number)


class KeptSignals:
    """Context in which the first SIGTERM or SIGINT waits for :meth:`deliver`; a second press acts at once.

    Delivered, a signal ends the process as it is used to: a handler that somebody set is called, then SIGINT raises
    ``KeyboardInterrupt`` and SIGTERM ``SystemExit(143)``. Signals that were ignored stay ignored. Outside the main
    thread, where Python handles no signals, nothing is kept.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that waits."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> KeptSignals:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in _ENDING}
            self._before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, old in self._before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        if kind is None and self.number is not None:
            self.deliver()

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, monotonic()
        elif monotonic() - self._since > _ONE_PRESS:
            self.deliver()

    def deliver(self) -> NoReturn:
        """End as the kept signal asked for, or as SIGTERM does where it came to another process of this run."""
        number = signal.SIGTERM if self.number is None else self.number
        if callable(old := self._before.get(number)):
            old(number, None)
        _leave(number)
