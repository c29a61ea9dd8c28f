"""Count bonuses: what shares a code, what does not, and that they reach the loss."""

from __future__ import annotations

import dataclasses

import numpy as np

from selm_jax.preferences.examples import Example
from selm_jax.preferences.novelty import _code, with_bonuses
from selm_jax.preferences.packing import common_shape, pack
from selm_jax.training.update import by_role


def explored(*answers):
    return [Example.of(f"p{i}", (1, 2), {"explore": ids}) for i, ids in enumerate(answers)]


def test_a_bonus_is_that_of_the_count():
    rare, common = (11, 12, 13, 14), (21, 22, 23)
    found = with_bonuses(explored(common, rare, *[common] * 8), 32)
    np.testing.assert_allclose([e.bonus for e in found], [1 / 3, 1, *[1 / 3] * 8])
    several = dataclasses.replace(
        Example.of("p", (1,), {"explore": rare, "explore/2": common, "rejected": (9,)}),
    )
    (*_, one) = with_bonuses([*explored(common, common, common), several], 32)
    assert one.bonus == (1 + 1 / 2) / 2


def test_answers_that_share_most_of_their_text_share_most_bits():
    rng = np.random.default_rng(0)
    near, far = [], []
    for _ in range(50):
        text = rng.integers(0, 50_000, 100)
        changed = text.copy()
        changed[rng.integers(100)] += 1
        codes = [_code(tuple(ids), 64) for ids in (text, changed, rng.integers(0, 50_000, 100))]
        near.append((codes[0] ^ codes[1]).bit_count())
        far.append((codes[0] ^ codes[2]).bit_count())
    assert np.mean(near) < 8 and abs(np.mean(far) - 32) < 3


def test_bonuses_reach_the_loss_whatever_the_packing():
    examples = with_bonuses(explored((5, 6), (5, 6), (7, 8, 9), (4,) * 9), 32)
    expected = {e.prompt_id: e.bonus for e in examples}
    assert len(set(expected.values())) == 2
    for time in (12, 40):
        shape = common_shape([examples], rows=2, time=time)
        found = []
        for batch in pack(examples, shape):
            zeros = np.zeros_like(batch.reference)
            logps = by_role(batch, zeros, zeros, np.ones(3, np.float32))
            found += [
                (float(n), float(b))
                for n, b, w in zip(
                    logps.lengths["explore"], logps.bonus, batch.weight.reshape(-1), strict=True
                )
                if w
            ]
        of_length = [(len(e.responses[0]), np.float32(e.bonus)) for e in examples]
        assert sorted(found) == sorted(of_length)
