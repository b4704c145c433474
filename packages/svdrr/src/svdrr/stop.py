"""Stopping between two steps, with everything saved: at SIGINT or SIGTERM, or when the time is over."""

import signal
import time
from types import FrameType, TracebackType


class StoppedError(Exception):
    """The run was asked to stop and did; the message says where."""


class StopRequest:
    """While entered, SIGINT and SIGTERM set `reason` instead of ending the process; a second one ends it at once."""

    def __init__(self, max_minutes: float | None) -> None:
        self.signal: int | None = None
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def reason(self) -> str | None:
        """Why to stop, in words; None where there is no reason to."""
        if self.signal is not None:
            return f"stopped by {signal.Signals(self.signal).name}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "stopped by --max-minutes"
        return None

    def check(self, where: str) -> None:
        """Raises StoppedError(where) if there is a reason to stop."""
        if self.reason:
            raise StoppedError(where)
