"""Decoding in a process of its own: a decoder that crashes or hangs costs one series, not the run."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from drrgen.defects import SeriesRejected
from drrgen.dicom import pixels
from drrgen.dicom.series import Slice

# A slice takes milliseconds; a minute is enough for a slow disk and not for one that hangs.
SLICE_LIMIT_S = 60.0


class Decoder:
    """Like `pixels.decode`, in another process, which is started when first needed and again after a crash.

    Slices arrive through a pipe one by one, so that the memory used is that of one slice in each process.
    """

    def __init__(self, limit_s: float = SLICE_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __call__(self, slices: Iterable[Slice]) -> Iterator[NDArray[np.int16]]:
        """Raises SeriesRejected at a slice that cannot be decoded, crashes the process or takes too long."""
        ones = list(slices)
        pipe = self._started()
        finished = False
        try:
            pipe.send(ones)
            for one in ones:
                image = np.empty(one.shape, np.int16)
                answer = self._answer(pipe, one)
                if isinstance(answer, SeriesRejected):
                    finished = True
                    raise answer
                pipe.recv_bytes_into(image.data.cast("B"))
                yield image
            finished = True
        except (BrokenPipeError, EOFError, ConnectionError) as error:
            raise pixels.undecodable(one.path, "the decoder crashed on it") from error
        finally:
            if not finished:
                self.close()  # it may be in the middle of anything

    def _answer(self, pipe: Connection, one: Slice) -> SeriesRejected | None:
        if not pipe.poll(self._limit_s):
            raise pixels.undecodable(one.path, f"the decoder did not finish in {self._limit_s:g} seconds")
        return pipe.recv()

    def _started(self) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe

    def close(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(pipe: Connection) -> None:
    """For each list of slices that comes in: None and the pixels for every slice, or the rejection and no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            slices = pipe.recv()
        except EOFError:
            return
        try:
            for image in pixels.decode(slices):
                pipe.send(None)
                pipe.send_bytes(np.ascontiguousarray(image).data.cast("B"))
        except SeriesRejected as error:
            pipe.send(error)
