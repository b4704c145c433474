"""What processes tell one another before they go on, by two threads that gather as two processes do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from svdrr.errors import InputError
from svdrr.processes import require_same, unless_one_fails


class Member:
    """What of an Accelerator is asked for here."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, index: int, given: list[Tensor | None], barrier: Barrier) -> None:
        self.process_index, self.is_main_process, self._given, self._barrier = index, index == 0, given, barrier

    def gather(self, mine: Tensor) -> Tensor:
        self._given[self.process_index] = mine
        self._barrier.wait()
        together = torch.cat(self._given)
        self._barrier.wait()
        return together


def both(work: Callable[[Member], Any]) -> list[Any]:
    """What work returns or raises in each of two; a minute is for a member that waits in vain."""
    given, barrier = [None, None], Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(work, Member(index, given, barrier)) for index in range(2)]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [InputError("damaged"), OSError("no such disk")])
def test_where_one_fails_nobody_goes_on_and_one_says_why(failing: int, error: Exception) -> None:
    def work(member: Member) -> int:
        if member.process_index == failing:
            raise error
        return 1

    found = both(lambda member: unless_one_fails(member, lambda: work(member)))
    assert found[failing] is error
    assert isinstance(found[1 - failing], SystemExit)
    assert found[1 - failing].code == 2


def test_where_none_fails_each_has_its_own() -> None:
    assert both(lambda member: unless_one_fails(member, lambda: member.process_index + 5)) == [5, 6]


def test_what_is_not_the_same_is_said_once() -> None:
    digests = ["00ff", "01ff"]
    said, left = both(lambda member: require_same(member, "the file", lambda: digests[member.process_index]))
    assert isinstance(said, InputError)
    assert str(said).startswith("the file is not the same for process 0 and 1: ")
    assert isinstance(left, SystemExit)
    assert left.code == 2
    assert both(lambda member: require_same(member, "the file", lambda: "ff00")) == [None, None]
