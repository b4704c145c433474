"""CTs to shards in several processes of one machine, each a pipeline of its own. One that dies costs one CT at most."""

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from drrgen import pipeline
from drrgen.config import RenderConfig
from drrgen.defects import Defect, SeriesRejected
from drrgen.pipeline import Job, Refused, Rendered, Report

# How often a CT is begun, by processes that die with it in hand, before it is given up.
_ATTEMPTS = 2


@dataclass
class _Process:
    process: BaseProcess
    pipe: Connection
    taken: dict[Path, Job] = field(default_factory=dict)


def render_jobs(
    jobs: Iterable[Job], config: RenderConfig, on_defect: str, num_threads: int, num_workers: int, report: Report
) -> None:
    """As `pipeline.render_jobs`, by `num_workers` processes that share the threads.

    Where a process dies (out of memory, most likely), what it had in hand is begun once more by another one.
    """
    waiting = deque(jobs)
    attempts: Counter[Path] = Counter()
    arguments = (config, on_defect, max(1, num_threads // num_workers))
    running: dict[Connection, _Process] = {}
    try:
        for _ in range(min(num_workers, len(waiting))):
            _start(running, *arguments)
        while running:
            for pipe in wait(list(running)):
                one = running[pipe]  # type: ignore[index]
                try:
                    message = one.pipe.recv()
                except (EOFError, ConnectionError):
                    del running[one.pipe]
                    one.process.join()
                    if one.process.exitcode:
                        _give_back(one, waiting, attempts, report)
                        if waiting:
                            _start(running, *arguments)
                    continue
                if message is None:
                    job = waiting.popleft() if waiting else None
                    if job:
                        attempts[job.path] += 1
                        one.taken[job.path] = job
                    one.pipe.send(job)
                elif isinstance(message, BaseException):
                    raise message
                else:
                    if isinstance(message, Rendered | Refused):
                        del one.taken[message.path]
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
    process.start()
    theirs.close()
    running[ours] = _Process(process, ours)


def _give_back(dead: _Process, waiting: deque[Job], attempts: Counter[Path], report: Report) -> None:
    for path, job in dead.taken.items():
        if attempts[path] < _ATTEMPTS:
            waiting.append(job)
        else:
            why = f"the process that rendered it died {_ATTEMPTS} times (exit code {dead.process.exitcode})"
            report(Refused(path, SeriesRejected(Defect("process-died", f"{why}: fewer --workers need less memory"))))


def _serve(pipe: Connection, config: RenderConfig, on_defect: str, num_threads: int) -> None:
    """Ask for jobs with None, tell of them, and end when there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the main one decides

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
