import threading
import time

import pytest

from train_utils.in_order import MOST_HELD, in_order


def test_the_order_stays_and_two_are_worked_on_at_once():
    at_once, most, lock = 0, 0, threading.Lock()

    def work(seconds):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(seconds)
        with lock:
            at_once -= 1
        return seconds

    items = [0.2, 0.0, 0.1, 0.0, 0.05]
    assert list(in_order(work, items)) == items
    assert most == 2
    assert list(in_order(work, [])) == []


def test_items_are_taken_one_ahead():
    taken = []

    def items():
        for item in range(6):
            taken.append(item)
            yield item

    def work(item):
        time.sleep(0.05)
        return item

    results = in_order(work, items())
    assert next(results) == 0 and len(taken) == 2
    assert next(results) == 1 and len(taken) == 3
    results.close()
    assert len(taken) == 3


def test_the_other_thread_goes_on_behind_a_long_item():
    """Until so many results wait that they would take too much memory."""
    slow, fast = threading.Event(), []

    def work(item):
        if item == 0:
            assert slow.wait(timeout=10)
        else:
            fast.append(item)
            if len(fast) == MOST_HELD:
                threading.Timer(0.2, slow.set).start()
        return item

    results = in_order(work, range(40))
    assert next(results) == 0
    assert len(fast) == MOST_HELD
    assert list(results) == list(range(1, 40))


def test_an_error_comes_in_its_place():
    results = in_order(lambda item: 1 / item, [1, 0, 2])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_what_was_begun_comes_after_an_interrupt():
    stopped = []

    def work(item):
        if item == 2:
            raise KeyboardInterrupt
        time.sleep(0.05)
        return item

    results = in_order(work, iter(range(100)), on_interrupt=lambda: stopped.append(True))
    found = []
    with pytest.raises(KeyboardInterrupt):
        for result in results:
            found.append(result)
    assert stopped == [True] and found == [0, 1, 3]
