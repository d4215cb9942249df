"""A number of places that threads share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Places:
    """Places that threads share: work that needs all of them waits until it is alone."""

    def __init__(self, number: int) -> None:
        self._free = threading.Semaphore(number)
        self._next = threading.Lock()

    @contextmanager
    def taken(self, places: int) -> Iterator[None]:
        """Hold so many of the places, as soon as they are free."""
        with self._next:  # one after the other, so that two do not each hold a place and wait for a second
            for _ in range(places):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(places)
