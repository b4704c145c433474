"""The loop's parts: what is read ahead, the learning rate, the average of the weights."""

import threading

import pytest
from torch import nn

from svdrr.loop import READ_AHEAD, ahead, schedule, update_average


@pytest.mark.parametrize(("first", "steps"), [(0, 0), (0, 1), (0, READ_AHEAD), (2, 3 * READ_AHEAD), (9, 9)])
def test_every_step_is_read_once_in_its_order_and_in_pieces(first: int, steps: int) -> None:
    rows = [slice(0, 2), slice(2, 3)]
    found = list(ahead(lambda step, piece: (step, piece), first, steps, rows))
    assert found == [[(step, rows[0]), (step, rows[1])] for step in range(first, steps)]


def test_what_is_wrong_with_a_step_is_raised_when_it_is_its_turn() -> None:
    def read(step: int, rows: slice) -> int:
        if step == 2:
            raise OSError("no such disk")
        return step

    batches = ahead(read, 0, 100, [slice(0, 1)])
    assert [next(batches), next(batches)] == [[0], [1]]
    with pytest.raises(OSError, match="no such disk"):
        next(batches)


def test_no_more_is_read_ahead_than_is_said_and_nothing_once_it_is_closed() -> None:
    seen, lock = set(), threading.Lock()

    def read(step: int, rows: slice) -> None:
        with lock:
            seen.add(step)

    batches = ahead(read, 0, 1000, [slice(0, 1)])
    next(batches)
    batches.close()
    assert max(seen) <= READ_AHEAD


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [schedule(step, 100, 10, decay=True) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] > 0.97
    assert rates[99] < 0.001
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_without_decay_the_learning_rate_stays_after_the_warm_up() -> None:
    rates = [schedule(step, 100, 10, decay=False) for step in range(100)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] + 91 * [1.0])


def test_the_average_of_the_weights() -> None:
    average, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(average.weight, 1.0)
    nn.init.constant_(model.weight, 3.0)
    update_average(average, model, decay=0.75)
    assert average.weight.item() == 1.5
