"""Results in the order of the items, some begun ahead; how many is bounded."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from retina.data.prefetch import run_ahead


def test_what_is_finished_last_keeps_its_place() -> None:
    released = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert released.wait(1000)
        else:
            released.set()
        return item * item

    with ThreadPoolExecutor(2) as threads:
        assert list(run_ahead(lambda item: threads.submit(work, item), range(9), 2)) == [k * k for k in range(9)]


@pytest.mark.parametrize(
    ("costs", "begun"),
    [
        ([1, 1, 1, 1, 1], [2, 3, 4, 5, 5]),
        ([9, 1, 1, 1, 1], [1, 3, 4, 5, 5]),
        ([1, 9, 1, 1, 1], [1, 2, 4, 5, 5]),
        ([0, 0, 0, 0, 0], [5, 5, 5, 5, 5]),
    ],
)
def test_as_much_is_under_way_as_there_is_room_for(costs: list[int], begun: list[int]) -> None:
    """The one in the caller's hands counts; one that is too large for the room is alone in it."""
    under_way: list[int] = []

    def begin(cost: int) -> "Future[int]":
        under_way.append(cost)
        future: Future[int] = Future()
        future.set_result(cost)
        return future

    seen = []
    for cost in run_ahead(begin, costs, 2, lambda cost: cost):
        seen.append((cost, len(under_way)))
    assert seen == list(zip(costs, begun, strict=True))


def test_a_fault_comes_in_its_turn_and_ends_the_rest() -> None:
    futures: list[Future[int]] = []

    def begin(item: int) -> "Future[int]":
        futures.append(Future())
        if item == 1:
            futures[-1].set_exception(KeyError("one"))
        elif item == 0:
            futures[-1].set_result(0)
        return futures[-1]

    results = run_ahead(begin, range(9), 4)
    assert next(results) == 0
    with pytest.raises(KeyError):
        next(results)
    assert all(future.done() for future in futures), "those that had not begun are called off"
