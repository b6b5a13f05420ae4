"""Work that threads do before its result is asked for. Beside the road."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_ahead(
    begin: Callable[[T], Future[R]], items: Iterable[T], room: int, cost: Callable[[T], int] = lambda item: 1
) -> Iterator[R]:
    """The result of each item, in their order.

    Items are begun before their results are asked for, as long as the costs of those that are begun, the one in the
    caller's hands among them, add up to at most `room`; one alone may cost more. A fault of one is raised in its turn,
    and ends the iteration."""
    waiting: deque[tuple[int, Future[R]]] = deque()
    held = 0
    try:
        for item in items:
            price = cost(item)
            while waiting and held + price > room:
                paid, future = waiting.popleft()
                yield future.result()
                held -= paid
            waiting.append((price, begin(item)))
            held += price
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        for _, future in waiting:
            future.cancel()
