"""The batch of a ranker is halved where memory runs out, if nobody gave a number."""

from __future__ import annotations

from collections import Counter

import pytest
from jax.errors import JaxRuntimeError

from selm_jax.feedback.models.settings import Needs, batch_in, batch_of, reported

SMALL = Needs(held=8, row=1)
FULL = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")


def needs(most: int, error: Exception = FULL):
    def work(rows: int) -> int:
        if rows > most:
            raise error
        return rows

    return work


def test_it_is_halved_until_it_fits_and_stays_so():
    batch, counts = batch_of("pairrm", None, SMALL, on_cpu=False), Counter[str]()
    assert batch.fitting(needs(5), counts) == 4 == batch.rows
    assert reported(counts, ["tokens"]) == {"tokens": 0, "batch_halved": 2}
    assert batch.fitting(needs(5), counts) == 4 and counts["batch_halved"] == 2
    with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        batch.fitting(needs(0), counts)
    assert batch.rows == 1


@pytest.mark.parametrize(
    "given, room, expected",
    [(None, 10**9, 16), (None, 18, 8), (None, 15, 4), (None, 1, 1), (5, 1, 5)],
)
def test_it_is_what_fits_beside_the_weights(given, room, expected):
    assert batch_in("pairrm", given, SMALL, room, on_cpu=False) == expected
    assert batch_in("pairrm", given, SMALL, room, on_cpu=True) == (given or min(expected, 2))


def test_it_is_lowered_to_what_an_earlier_start_found_out():
    batch, given = (batch_of("pairrm", rows, SMALL, on_cpu=False) for rows in (None, 16))
    assert not batch.lowered
    for rows in (32, 4, 8):
        batch.lower(rows)
        given.lower(rows)
    assert (batch.rows, batch.lowered, given.rows, given.lowered) == (4, True, 16, False)


def test_a_number_stays_and_other_errors_pass():
    counts = Counter[str]()
    with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        batch_of("pairrm", 8, SMALL, on_cpu=False).fitting(needs(5), counts)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        batch_of("pairrm", None, SMALL, False).fitting(
            needs(5, JaxRuntimeError("INTERNAL: x")), counts
        )
    assert reported(counts, ["tokens"]) == {"tokens": 0}
