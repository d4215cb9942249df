import threading
import time

import pytest

from src.places import Places


def test_work_that_needs_all_places_is_alone():
    places, active, seen = Places(2), [], []

    def work(number):
        with places.taken(number):
            active.append(number)
            time.sleep(0.02)
            seen.append(tuple(active))
            active.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 1, 1, 2, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    assert len(seen) == 7
    assert all(sum(together) <= 2 for together in seen)
    assert (1, 1) in seen


def test_places_are_free_again_after_an_error():
    places = Places(2)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), places.taken(2):
            _ = 1 / 0
