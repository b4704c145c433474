"""Where the time of a run goes: seconds at work by stage. Stages overlap, so they add up to more than the run took."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stages:
    """A stopwatch for each stage, in the order of first use; each stage belongs to one thread at a time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


def table(stages: Mapping[str, float], seconds: float, num_threads: int, busy: float | None) -> str:
    """Lines for people: each stage, how long it was at work, and which part of the run's `seconds` that is.

    busy: the share of the time of `num_threads` processors that was used; None where nobody knows.
    """
    width = max(map(len, ["stage", *stages]))
    lines = [f"{'stage':{width}}  seconds  of the run"]
    lines += [f"{stage:{width}}  {each:7.1f}  {each / seconds:9.0%}" for stage, each in stages.items()]
    known = "" if busy is None else f", its {num_threads} processors busy {busy:.0%} of the time"
    return "\n".join([*lines, f"the run took {seconds:.1f} s{known}"])
