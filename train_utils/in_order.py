"""Work on several items at once, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")

MOST_HELD = 4  # results that may wait for their turn; those of predict.py are lost if it is killed


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    at_once: int = 2,
    on_interrupt: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """The results of a function, in the order of the items; `at_once` threads work on as many of them ahead.

    While the result of one that takes long is waited for, the other threads go on, until MOST_HELD results wait for it.
    An error of the function is raised in its place. Items that were begun are finished even if the iterator is closed.
    After a KeyboardInterrupt, `on_interrupt` is called, their results still come, and then the KeyboardInterrupt.
    """
    under_way: deque[Future[Result]] = deque()
    interruption = None
    with ThreadPoolExecutor(at_once) as threads:
        remaining = iter(items)
        try:
            while True:
                while interruption is None and _room(under_way, at_once):
                    try:
                        under_way.append(threads.submit(function, next(remaining)))
                    except StopIteration:
                        break
                if not under_way:
                    break
                try:
                    if not under_way[0].done():
                        wait([future for future in under_way if not future.done()], return_when=FIRST_COMPLETED)
                        continue
                    result = under_way[0].result()
                except KeyboardInterrupt as error:
                    if interruption is not None:
                        raise
                    interruption = error
                    on_interrupt()
                    if under_way[0].done() and under_way[0].exception() is error:
                        under_way.popleft()
                    continue
                under_way.popleft()
                yield result
        finally:
            for future in under_way:
                future.cancel()
    if interruption is not None:
        raise interruption


def _room(under_way: Sequence[Future], at_once: int) -> bool:
    """Whether to begin another item: fewer are under way, or a thread is free while the first one goes on."""
    if len(under_way) < at_once:
        return True
    running = sum(not future.done() for future in under_way)
    return running < at_once and len(under_way) <= MOST_HELD and not under_way[0].done()
