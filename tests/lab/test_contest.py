"""The arms' losses against plain DPO and against their formulas, in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.lab import contest, samplers
from selm_jax.lab.algorithms import Settings
from selm_jax.lab.arms import ADDS, ARMS, BENDS, SAMPLERS
from selm_jax.lab.compare import Place, Task
from selm_jax.lab.rounds import Examples, as_examples, every_pair, expected_bonus, mean_loss
from selm_jax.objectives.losses import dpo, ipo, optimism, sppo_hard

BEND = {bend.name: bend for bend in BENDS}
TAU = 0.4


@pytest.fixture
def case(world):
    """A world of beta 0.3, labelled pairs in it, and a policy and a moved reference."""
    w = world(dimension=3, prompts=2, responses=5)
    draws = np.random.default_rng(0).integers(5, size=(3, 12))
    data = Examples(*(jnp.asarray(x) for x in (np.arange(12) % 2, *draws)), jnp.ones(12))
    data = data._replace(explore=jnp.where(jnp.arange(12) % 3 == 0, data.chosen, data.rejected))
    theta, other = (0.5 * jax.random.normal(jax.random.key(k), (3,)) for k in (1, 2))
    return w, data, theta, w.log_policy(other)


def loss_and_slope(name, case, strength):
    w, data, theta, reference = case
    return compiled(name)(theta, w, reference, data, strength)


@functools.cache
def compiled(name):
    def cost(theta, w, reference, data, strength):
        tables = w.log_policy(theta), reference
        return contest.bent(BEND[name], w, TAU, strength, *tables, data)

    return jax.jit(jax.value_and_grad(cost))


def plain(objective, case, divisor=1.0):
    w, data, theta, reference = case

    def cost(theta):
        unit = TAU * divisor
        return mean_loss(objective, w.log_policy(theta) / unit, reference / unit, data)

    return jax.jit(jax.value_and_grad(cost))(theta)


def equal(found, expected, scale=1.0):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, scale * b, rtol=1e-8, atol=1e-10)


def test_without_strength_every_term_is_dpo_and_with_it_none_is(case):
    base = plain(dpo(0.3), case)
    terms = [bend.name for bend in BENDS if bend.kind == ADDS]
    for name in terms:
        equal(loss_and_slope(name, case, 0.0), base)
        assert not np.allclose(loss_and_slope(name, case, 0.5)[1], base[1], rtol=1e-3)


def test_other_losses_see_only_who_won(case):
    """With the label alone, they are the losses of certain preferences, beta divided."""
    even = 0.3**2 / 8
    equal(loss_and_slope("dpo", case, 1.0), plain(dpo(0.3), case))
    equal(loss_and_slope("dpo", case, 2.0), plain(dpo(0.3), case, 2.0), 4)
    hard = ipo(0.3, length_normalized=False)
    equal(loss_and_slope("ipo_online", case, 2.0), plain(hard, case, 2.0), 4 * even)
    equal(loss_and_slope("nash", case, 2.0), plain(hard, case, 2.0), 4 * even)
    equal(loss_and_slope("sppo", case, 2.0), plain(sppo_hard(0.3), case, 2.0), 2 * even)


def test_a_term_is_its_exact_mean_over_who_explores(case):
    w, data, theta, reference = case

    def expected(explorer, weight):
        def cost(theta):
            tables = w.log_policy(theta) / TAU, reference / TAU
            bonus = expected_bonus(optimism(1.0), w, explorer, *tables)
            return mean_loss(dpo(0.3), *tables, data) + weight * bonus

        return jax.value_and_grad(cost)(theta)

    flat = jnp.full_like(reference, -jnp.log(5.0))
    equal(loss_and_slope("selm", case, 0.7), expected(reference, 0.7 * 0.3))
    equal(loss_and_slope("vpo", case, 0.7), expected(flat, 0.7 * 0.3))
    equal(loss_and_slope("vpo_pessimistic", case, 0.7), expected(flat, -0.7 * 0.3))


def test_probabilities_are_read_undivided(case):
    """GEB's complement raises the loss by the mean probability of y_e, whatever the noise."""
    w, _, theta, reference = case
    p = jnp.exp(w.log_policy(theta))
    found = loss_and_slope("geb_complement", case, 2.0)[0] - plain(dpo(0.3), case)[0]
    mean = jnp.sum(w.prompts[:, None] * jnp.exp(reference) * p)
    np.testing.assert_allclose(found, 2 * mean, rtol=1e-9)


def test_copo_counts_what_was_compared(case):
    w, data, theta, reference = case
    seen = contest.counts(data, reference)
    assert seen.sum() == 24
    log_policy = w.log_policy(theta)
    ratio = jnp.minimum(jnp.exp(log_policy - reference), 5)
    weight = ratio / jnp.sqrt(1 + seen) / 10
    mean = jnp.sum(w.prompts[:, None] * jnp.exp(reference) * weight * log_policy)
    found = loss_and_slope("copo", case, 3.0)[0] - plain(dpo(0.3), case)[0]
    np.testing.assert_allclose(found, -3 * mean, rtol=1e-9)


@pytest.mark.parametrize("name", ["pilaf"])
def test_drawn_pairs_have_the_samplers_distribution(world, name):
    w = world(dimension=None, prompts=2, responses=4, landscape="cyclic", coverage=0.5)
    policy = jax.nn.log_softmax(jax.random.normal(jax.random.key(5), (2, 4)))
    pairs = getattr(samplers, name)(samplers.Two(policy, w.log_reference, 1.5))
    n, settings = 20_000, Settings(temperature=0.5)
    data = contest.ask(jax.random.key(1), w, settings, n, pairs, jnp.array(0.0))
    found = np.zeros((2, 4, 4))
    np.add.at(found, (data.prompt, data.chosen, data.rejected), 1 / n)
    wins = every_pair(w, jnp.zeros((2, 4)), jnp.zeros((2, 4)), settings)  # 2 nu P(y > y')
    joint = pairs.joint()
    expected = wins * (joint + joint.swapaxes(1, 2)) / 2
    np.testing.assert_allclose(found, expected, atol=4 * (0.25 / n) ** 0.5)
    np.testing.assert_allclose(as_examples(expected).weight.sum(), 1, rtol=1e-9)


def test_names_lead_to_their_functions():
    for arm in ARMS:
        made = Task(arm, Place("needle"), 3.0).entry()
        assert [BENDS[i].name for i in made.bend] == [arm.bend] * 2
        assert SAMPLERS[made.sampler].__name__ == arm.sampler
        assert len(arm.strengths) == 1 or 0 not in arm.strengths


def test_the_data_alone_and_the_fit_alone_are_bent():
    """The other policy is plain DPO's; the fit alone is to plain DPO's data."""
    arm = next(a for a in ARMS if a.name == "nash_md")
    data = Task(arm, Place("needle"), 5.0, judged=False).entry()
    fit = Task(arm, Place("needle"), 5.0, asker=False).entry()
    assert [BENDS[i].name for i in data.bend] == ["nash", "dpo"]
    assert [BENDS[i].name for i in fit.bend] == ["dpo", "nash"]
    assert data.strength.tolist() == [5, 1] and fit.strength.tolist() == [1, 5]
    assert [SAMPLERS[e.sampler].__name__ for e in (data, fit)] == ["nash", "policy_reference"]
