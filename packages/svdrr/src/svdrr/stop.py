"""Stopping between two steps, with everything saved: at SIGINT or SIGTERM, or when the time is over."""

import math
import signal
import threading
import time
from types import FrameType, TracebackType


class StoppedError(Exception):
    """The run was asked to stop and did. exit_code: what the process should end with."""

    def __init__(self, code: int, where: str) -> None:
        reason = "--max-minutes" if code == TIME_IS_OVER else signal.Signals(code).name
        super().__init__(f"stopped by {reason}, saved at {where}: the same command goes on from there")
        self.exit_code = 0 if code == TIME_IS_OVER else 128 + code


TIME_IS_OVER = 255
"""The code of --max-minutes; those of signals are smaller."""

SAME_REQUEST_S = 2.0
"""One Ctrl-C can come twice: to the whole group of processes, and from whoever started them."""


class StopRequest:
    """While entered, SIGINT and SIGTERM set `code` instead of ending the process; another, later, ends it at once.

    In a thread other than the main one only the time can be over.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._signal, self._since = 0, math.inf
        self._deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __enter__(self) -> "StopRequest":
        # Python lets the main thread alone handle signals: in another, they stay whoever's they are
        asked_by = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._handlers = {number: signal.signal(number, self._receive) for number in asked_by}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now > self._since + SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal, self._since = number, min(now, self._since)

    @property
    def code(self) -> int:
        """Why to stop: a signal's number, or TIME_IS_OVER; 0 where there is no reason to."""
        if self._signal:
            return self._signal
        return TIME_IS_OVER if time.monotonic() > self._deadline else 0

    @staticmethod
    def obey(code: int, where: str) -> None:
        """Raises StoppedError for any code but 0."""
        if code:
            raise StoppedError(code, where)
