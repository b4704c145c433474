"""Work on files from outside in a process of its own: a decoder that crashes or hangs costs one CT, not the run."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

# A slice takes milliseconds and a whole file seconds; this is enough for a slow disk and not for one that hangs.
IMAGE_LIMIT_S = 120.0


class Crashed(Exception):
    """The process died, or took too long for one image."""


@contextmanager
def shielded(*signals: signal.Signals) -> Iterator[None]:
    """Processes started in this block are never disturbed by these signals: who started them decides.

    Ctrl-C reaches all that a terminal runs, and SIGTERM all that a scheduler runs. They are blocked from a process'
    first instruction on, because its imports take seconds, in which a handler of its own is not set yet.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started in the block, it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    """Runs generator functions in a process that is started when needed, and again after a crash.

    What they yield arrives through a pipe one by one, so that no more than one image is in memory in each process on
    their account.
    """

    def __init__(self, limit_s: float = IMAGE_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._is_over = False

    def run(self, function: Callable[[Any], Iterator[Any]], argument: Any) -> Iterator[Any]:
        """What `function(argument)` yields there. Raises what it raises, or Crashed."""
        pipe = self._started()
        is_idle = False
        try:
            pipe.send((function, argument))
            while True:
                if not pipe.poll(self._limit_s):
                    raise Crashed(f"the decoder did not finish in {self._limit_s:g} seconds")
                kind, value = pipe.recv()
                if kind == "end":
                    is_idle = True
                    if value is not None:
                        raise value
                    return
                if kind == "image":
                    value = np.empty(value, np.int16)
                    pipe.recv_bytes_into(value.data.cast("B"))
                yield value
        except (EOFError, ConnectionError) as error:
            raise Crashed("the decoder crashed on it") from error
        finally:
            if not is_idle:
                self.close()  # it may be in the middle of anything

    def _started(self) -> Connection:
        if self._is_over:  # another thread, which does not know that yet, would leave a process behind
            raise Crashed("there are no decoders any more")
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with shielded(signal.SIGINT, signal.SIGTERM):
                self._process.start()
            theirs.close()
        return self._pipe

    def close(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self.close()


def _serve(pipe: Connection) -> None:
    """For each function: what it yields, int16 images as bytes, and an end, with the exception that it was, or None."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders write there what they stumble over; ours is one line
    while True:
        try:
            function, argument = pipe.recv()
        except EOFError:
            return
        end = None
        try:
            for value in function(argument):
                if isinstance(value, np.ndarray):
                    pipe.send(("image", value.shape))
                    pipe.send_bytes(np.ascontiguousarray(value, np.int16).data.cast("B"))
                else:
                    pipe.send(("value", value))
        except Exception as error:
            end = error
        pipe.send(("end", end))
