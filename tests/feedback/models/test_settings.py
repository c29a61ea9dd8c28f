"""The batch of a ranker is halved where memory runs out, if nobody gave a number."""

from __future__ import annotations

from collections import Counter

import pytest
from jax.errors import JaxRuntimeError

from selm_jax.feedback.models.settings import batch_of, reported

FULL = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")


def needs(most: int, error: Exception = FULL):
    def work(rows: int) -> int:
        if rows > most:
            raise error
        return rows

    return work


def test_it_is_halved_until_it_fits_and_stays_so():
    batch, counts = batch_of("pairrm", None, on_cpu=False), Counter[str]()
    assert batch.fitting(needs(5), counts) == 4 == batch.rows
    assert reported(counts, ["tokens"]) == {"tokens": 0, "batch_halved": 2}
    assert batch.fitting(needs(5), counts) == 4 and counts["batch_halved"] == 2
    with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        batch.fitting(needs(0), counts)
    assert batch.rows == 1


def test_a_number_stays_and_other_errors_pass():
    counts = Counter[str]()
    with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        batch_of("pairrm", 8, on_cpu=False).fitting(needs(5), counts)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        batch_of("pairrm", None, False).fitting(needs(5, JaxRuntimeError("INTERNAL: x")), counts)
    assert reported(counts, ["tokens"]) == {"tokens": 0}
