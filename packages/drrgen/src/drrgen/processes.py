"""CTs to shards in several processes of one machine, each a pipeline of its own. One that dies costs one CT at most."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from drrgen import pipeline
from drrgen.config import RenderConfig
from drrgen.defects import Defect, SeriesRejected
from drrgen.errors import InputError
from drrgen.pipeline import Cast, Job, Refused, Rendered, Report
from drrgen.worker import shielded


@dataclass
class _Process:
    """taken: what it has in hand; num_cast: views of these; is_trial: it has one that another died with, no more."""

    process: BaseProcess
    pipe: Connection
    taken: dict[Path, Job] = field(default_factory=dict)
    num_cast: int = 0
    has_asked: bool = False
    is_trial: bool = False


def render_jobs(
    jobs: Iterable[Job], config: RenderConfig, on_defect: str, num_threads: int, num_workers: int, report: Report
) -> None:
    """As `pipeline.render_jobs`, by `num_workers` processes that share the threads.

    Where a process dies (out of memory, most likely), what it had in hand, up to three CTs, is begun once more, each by
    a process that has nothing else: so the one that kills is found, and the others are not given up with it.
    """
    waiting, suspects = deque(jobs), deque[Job]()
    num_workers = min(num_workers, len(waiting))
    arguments = (config, on_defect, max(1, num_threads // max(1, num_workers)))
    running: dict[Connection, _Process] = {}
    try:
        for _ in range(num_workers):
            _start(running, *arguments)
        while running:
            for pipe in wait(list(running)):
                one = running[pipe]  # type: ignore[index]
                try:
                    message = one.pipe.recv()
                except (EOFError, OSError):
                    del running[one.pipe]
                    one.process.join()
                    _give_back(one, suspects, report)
                    if not one.has_asked and not running:
                        raise InputError(
                            f"--workers {num_workers}: processes die as they start (exit code {one.process.exitcode}): "
                            "fewer of them need less memory"
                        ) from None
                    if one.has_asked and (waiting or suspects):
                        _start(running, *arguments)
                    continue
                if message is None:
                    with suppress(ConnectionError):  # where it has died since it asked, the pipe's end comes next
                        one.pipe.send(_taken(one, waiting, suspects))
                elif isinstance(message, BaseException):
                    raise message
                else:
                    match message:
                        case Cast(num_views):
                            one.num_cast += num_views
                        case Rendered(path, num_views):
                            del one.taken[path]
                            one.num_cast -= num_views
                        case Refused(path, _, num_cast):
                            del one.taken[path]
                            one.num_cast -= num_cast
                    report(message)
    finally:
        for one in running.values():
            one.process.terminate()
        for one in running.values():
            one.process.join()


def _start(running: dict[Connection, _Process], *arguments: Any) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, *arguments))
    with shielded(signal.SIGINT):
        process.start()
    theirs.close()
    running[ours] = _Process(process, ours)


def _taken(one: _Process, waiting: deque[Job], suspects: deque[Job]) -> Job | None:
    """The next CT for a process, now in its hand; None where it shall end."""
    one.has_asked = True
    if one.is_trial:
        return None
    one.is_trial = bool(suspects) and not one.taken
    jobs = suspects if one.is_trial else waiting
    if not jobs:
        return None
    job = jobs.popleft()
    one.taken[job.path] = job
    return job


def _give_back(dead: _Process, suspects: deque[Job], report: Report) -> None:
    """What a process had in hand when it ended, if anything, is to be tried once more, or given up."""
    if dead.num_cast:
        report(Cast(-dead.num_cast))
    if not dead.is_trial:
        suspects.extend(dead.taken.values())
        return
    for path in dead.taken:
        why = f"the process that rendered it died 2 times (exit code {dead.process.exitcode})"
        report(Refused(path, SeriesRejected(Defect("process-died", f"{why}: fewer --workers need less memory"))))


def _serve(pipe: Connection, config: RenderConfig, on_defect: str, num_threads: int) -> None:
    """Ask for jobs with None, tell of them, and end when there is none."""

    def jobs() -> Iterator[Job]:
        pipe.send(None)
        while job := pipe.recv():
            yield job
            pipe.send(None)

    try:
        pipeline.render_jobs(jobs(), config, on_defect, num_threads, pipe.send)
    except (EOFError, ConnectionError):
        pass  # the main process is gone
    except Exception as error:
        pipe.send(error)
