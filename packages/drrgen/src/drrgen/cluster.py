"""CTs to shards on a Ray cluster: a task for each CT, wherever there is room; what a lost node had is done again."""

import importlib.util
import logging
import os
from collections.abc import Iterable
from typing import Any

from drrgen import pipeline
from drrgen.config import RenderConfig
from drrgen.defects import Defect, SeriesRejected
from drrgen.errors import InputError
from drrgen.pipeline import Event, Job, Refused, Report

# Of a task, with the `cpu` projector: one thread renders faster, for each thread, than any number together.
_CPU = dict(num_cpus=1)
# With `cuda`: a GPU renders faster than one thread compresses.
_CUDA = dict(num_cpus=4, num_gpus=1)
# How often a CT is begun again where a node or its process is lost.
_RETRIES = 3


def require_ray() -> None:
    """Raises InputError where Ray is not installed."""
    if not importlib.util.find_spec("ray"):
        raise InputError("--engine ray: Ray is not installed: pip install 'drrgen[ray]'")


def render_jobs(jobs: Iterable[Job], config: RenderConfig, on_defect: str, report: Report) -> None:
    """As `pipeline.render_jobs`, on the Ray cluster that RAY_ADDRESS names, or one of this machine alone.

    Every node reads the CTs and writes the shards under the same paths. Raises InputError where no cluster is found.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray tells its makers of every run otherwise
    import ray

    resources = _CUDA if config.projector == "cuda" else _CPU
    if ours := not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except ConnectionError as error:
            raise InputError(f"--engine ray: no cluster answers at {os.environ.get('RAY_ADDRESS')}") from error
    try:
        task = ray.remote(max_retries=_RETRIES, **resources)(_render)
        under_way = {task.remote(job, config, on_defect, resources["num_cpus"]): job for job in jobs}
        while under_way:
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            job = under_way.pop(done)
            try:
                events = ray.get(done)
            except ray.exceptions.RayError as error:
                why = f"Ray lost it {_RETRIES + 1} times, or cannot run it: {next(iter(str(error).splitlines()), '')}"
                events = [Refused(job.path, SeriesRejected(Defect("process-died", why)))]
            for event in events:
                if isinstance(event, BaseException):
                    raise event
                report(event)
    finally:
        if ours:
            ray.shutdown()


def _render(job: Job, config: RenderConfig, on_defect: str, num_threads: int) -> list[Event | Exception]:
    """All that is to be told of a CT, at the end: an error as it is, because Ray would wrap it in its trace."""
    events: list[Any] = []
    try:
        pipeline.render_jobs([job], config, on_defect, num_threads, events.append)
    except Exception as error:
        events.append(error)
    return events
