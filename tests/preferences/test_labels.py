"""Drawn labels: frequencies against the stated probabilities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.feedback.ranker import FeedbackError
from selm_jax.preferences.candidates import Pair
from selm_jax.preferences.labels import label

PAIR = Pair(0, 1, 2)
gaps = st.floats(0, 5)
flips = st.floats(0, 0.5)


@given(gaps, st.floats(0.1, 10), flips, st.integers(0, 99))
def test_the_soft_label_is_the_judges_probability(gap, temperature, flip, seed):
    scores = [gap, 0.0, 7.0]
    pair, soft = label(
        PAIR, scores, kind="bradley_terry", temperature=temperature, flip=flip, seed=seed
    )
    p = 1 / (1 + np.exp(-gap / temperature))
    p = p * (1 - flip) + (1 - p) * flip
    assert pair in (PAIR, Pair(1, 0, 2))
    assert soft == pytest.approx(p if pair == PAIR else 1 - p)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 1.0),
        ({"flip": 0.2}, 0.8),
        ({"kind": "bradley_terry"}, 0.7310586),  # sigmoid(1)
        ({"kind": "bradley_terry", "temperature": 0.5}, 0.8807971),  # sigmoid(2)
        ({"kind": "bradley_terry", "flip": 0.5}, 0.5),
    ],
)
def test_frequencies(settings, kept):
    n = 2000
    found = [label(PAIR, [3.0, 2.0, 0.0], seed=(1, i), **settings) for i in range(n)]
    share = np.mean([pair == PAIR for pair, _ in found])
    assert abs(share - kept) <= 4 * np.sqrt(kept * (1 - kept) / n)
    again = [label(PAIR, [3.0, 2.0, 0.0], seed=(1, i), **settings) for i in range(n)]
    assert found == again


def test_a_response_against_itself_is_even():
    assert label(Pair(1, 1, 0), [1.0, 1.0], flip=0.5) == (Pair(1, 1, 0), 0.5)


def test_the_plain_label_needs_no_seed():
    assert label(PAIR, [3.0, 2.0, 0.0]) == (PAIR, 1.0)
    with pytest.raises(FeedbackError, match="needs a seed"):
        label(PAIR, [3.0, 2.0, 0.0], flip=0.1)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"kind": "bradley"}, "did you mean 'bradley_terry'"),
        ({"temperature": 0.0}, "above 0"),
        ({"flip": 0.6}, "from 0 to 0.5"),
        ({"flip": float("nan")}, "from 0 to 0.5"),
    ],
)
def test_refusals(settings, what):
    with pytest.raises(FeedbackError, match=what):
        label(PAIR, [1.0, 0.0, 0.0], seed=1, **settings)
