"""The parallel map in threads: order, errors and laziness."""

import threading

import pytest

from selm_jax.shell.threads import of_each


def test_results_come_in_the_order_of_the_items_and_are_counted():
    counted = []
    assert of_each(lambda x: x * x, range(100), lambda: counted.append(1)) == [
        x * x for x in range(100)
    ]
    assert len(counted) == 100
    assert of_each(str, []) == []


def test_the_first_item_builds_in_this_thread_what_serves_all():
    seen = of_each(lambda _: threading.current_thread(), range(3))
    assert seen[0] is threading.current_thread()


def test_the_error_of_the_first_bad_item_is_raised_and_what_has_not_begun_is_left():
    begun = []

    def f(x):
        begun.append(x)
        if x in (5, 7):
            raise ValueError(f"item {x}")

    with pytest.raises(ValueError, match="item 5"):
        of_each(f, range(200_000))
    assert len(begun) <= 6 + 4 * 8, "no more than a few for each of eight workers"
