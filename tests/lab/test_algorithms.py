import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.lab import exact, rounds
from selm_jax.lab.algorithms import POLICY, REFERENCE, Length, Settings, Slot, replace, zoo
from selm_jax.lab.many import run_many
from selm_jax.lab.worlds import WorldShape, make_world
from selm_jax.objectives.losses import ObjectiveError, dpo, optimism, selm

BETA = 0.1
SHAPE = WorldShape(prompts=2, responses=6, dimension=4, beta=BETA)
SHORT = Length(rounds=6, queries=2, steps=8)
ZOO = zoo(BETA, alpha=0.01)


@cache
def run(algorithm, seeds=3, **cell):
    return run_many(SHAPE, algorithm, SHORT, [cell], seeds=seeds)


@pytest.fixture(scope="module")
def small():
    """A world in single precision, and a policy in it."""
    w = make_world(jax.random.key(1), SHAPE, "two_peaks", 0.1)
    return w, w.log_policy(jax.random.normal(jax.random.key(2), w.theta_star.shape))


# --- algorithms ----------------------------------------------------------------------------------


@pytest.mark.slow_except("oracle", "dpo_online", "selm_moving", "xpo", "best_of_4")
@pytest.mark.parametrize("name", list(ZOO))
def test_no_regret_is_negative_and_every_run_moves(name):
    algorithm = ZOO[name]
    trace = run(algorithm, alpha=0.1, rate=0.05 if algorithm.optimizer == "adam" else 0.5)
    assert np.all(np.isfinite(trace.regret)) and trace.regret.min() >= -1e-6
    assert np.all(trace.reverse_kl[:, :, -1] > 0)
    assert np.all((trace.good >= 0) & (trace.good <= 1.00001))


@pytest.mark.parametrize("name", ["selm_fixed", "selm_moving", "selm_practice"])
def test_without_alpha_selm_is_dpo(name):
    # Two programs, with the term weighed by 0 and without it, which XLA may round differently.
    zero, plain = run(ZOO[name], alpha=0.0), run(replace(ZOO[name], bonus=None))
    np.testing.assert_allclose(zero.regret, plain.regret, rtol=1e-4, atol=1e-6)
    assert not np.allclose(run(ZOO[name], alpha=0.3).regret, plain.regret, rtol=1e-2)


def test_without_alpha_loss_and_slope_are_dpos_bit_for_bit(small):
    w, log_policy = small
    plain = replace(ZOO["selm_practice"], bonus=None, explore=1)
    data = rounds.sample(
        jax.random.key(0), w, (log_policy, w.log_reference), (1.0, 1.0), Settings(), 20, explore=1
    )
    theta = jax.random.normal(jax.random.key(9), w.theta_star.shape)

    def both(algorithm):
        return jax.value_and_grad(
            lambda th: rounds.loss(algorithm, w, Settings(), th, w.log_reference, data, 0.0)
        )(theta)

    for bonus in (replace(plain, bonus=optimism(1.0)), replace(plain, fit=selm(BETA, 0.0))):
        for a, b in zip(both(bonus), both(plain), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_oracle_ends_at_the_optimum_and_nobody_is_better():
    long = Length(rounds=40, queries=2, steps=8)
    regret = run_many(SHAPE, ZOO["oracle"], long, [{}], seeds=3).regret[0]
    assert np.all(regret[:, -1] < 0.002) and np.all(regret[:, -1] < regret[:, 0])
    assert np.all(regret[:, -1] <= regret[:, 10] + 1e-6)
    dpo_regret = run_many(SHAPE, ZOO["dpo_online"], long, [{}], seeds=3).regret[0]
    assert regret.sum() < dpo_regret.sum()


def test_dpo_with_endless_data_finds_the_optimum_at_any_known_temperature():
    algorithm = replace(ZOO["dpo_online"], exact_data=True)
    length = Length(rounds=40, queries=1, steps=64)
    cells = [{"temperature": t} for t in (0.1, 0.3, 1.0)]
    cells += [{"temperature": 0.3, "assumed": 1.0}]
    cells = [c | {"coverage": 0.2, "landscape": "smooth"} for c in cells]
    last = run_many(SHAPE, algorithm, length, cells, seeds=3).regret[..., -1].max(axis=1)
    assert np.all(last[:3] < 0.01), last
    assert last[3] > 0.02  # a learner that is wrong about the noise ends elsewhere


@pytest.mark.slow  # with the compiler's settings that the figures are made with
def test_equal_arguments_give_equal_bits_whatever_stands_beside():
    cell, other = {"alpha": 0.1}, {"alpha": 1.0, "temperature": 0.5}
    once = run_many(SHAPE, ZOO["selm_fixed"], SHORT, [cell], seeds=4)
    again = run_many(SHAPE, ZOO["selm_fixed"], SHORT, [other, cell, other], seeds=4)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a[0], b[1])
    different = run_many(SHAPE, ZOO["selm_fixed"], SHORT, [cell], seeds=4, seed=1)
    assert not np.array_equal(once.regret, different.regret)


def test_asker_and_judged_take_the_effect_apart():
    split = replace(ZOO["selm_fixed"], split=True)
    both, plain = run(split, alpha=0.3), run(split)
    # The queries of "judged" are plain DPO's, those of "asker" are SELM's; the fits the other way.
    judged, asker = run(split, alpha=0.3, asker=0.0), run(split, alpha=0.3, judged=0.0)
    np.testing.assert_array_equal(judged.accuracy, plain.accuracy)
    np.testing.assert_array_equal(asker.accuracy, both.accuracy)
    for a, b in ((judged, plain), (asker, both), (judged, both), (asker, plain)):
        assert not np.array_equal(a.regret, b.regret)
    np.testing.assert_allclose(both.regret, run(ZOO["selm_fixed"], alpha=0.3).regret, rtol=1e-4)


def test_alpha_falls_with_the_root_of_the_round(small):
    w, _ = small
    falling = replace(ZOO["selm_fixed"], schedule="inverse_sqrt", convention="alpha_beta")
    weights = [rounds.weight(falling, w, Settings(alpha=0.3), t, 9) for t in (1.0, 4.0, 9.0)]
    np.testing.assert_allclose(weights, np.array([0.3, 0.15, 0.1]) * BETA, rtol=1e-6)


def test_wrong_algorithms_are_refused():
    base = ZOO["selm_fixed"]
    for changes, message in (
        ({"schedule": "linear"}, "linear"),
        ({"exact_data": True, "slots": (POLICY,) * 3}, "two slots"),
        ({"moving": True, "split": True}, "cannot be combined"),
        ({"fit": selm(0.1, 0.1)}, "choose the slot of y_ref"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(base, **changes)
    with pytest.raises(ValueError, match="nobody"):
        Slot("nobody")
    with pytest.raises(ValueError, match="beta"):
        run_many(SHAPE, base, SHORT, [{"beta": 1}], seeds=2)
    with pytest.raises(ObjectiveError):
        optimism(float("nan"))


# --- the losses are the library's ----------------------------------------------------------------


def test_fit_plus_weighted_bonus_is_selm(small):
    w, log_policy = small
    data = rounds.sample(
        jax.random.key(0), w, (log_policy, w.log_reference), (1.0, 1.0), Settings(), 20, explore=1
    )
    whole = rounds.mean_loss(selm(BETA, 0.3), log_policy, w.log_reference, data)
    fit = rounds.mean_loss(dpo(BETA), log_policy, w.log_reference, data)
    bonus = rounds.mean_loss(optimism(1.0, BETA), log_policy, w.log_reference, data)
    np.testing.assert_allclose(fit + 0.3 * BETA * bonus, whole, rtol=1e-6)


# --- sampled against exact -----------------------------------------------------------------------


@pytest.mark.parametrize("temperature, flips", [(0.2, 0.1), (0.0, 0.0), (1.0, 0.0)])
def test_sampled_losses_have_the_exact_expectation(small, temperature, flips):
    w, log_policy = small
    settings = Settings(temperature=temperature, flips=flips)
    slots, n = (log_policy, w.log_reference), 40_000
    data = rounds.sample(jax.random.key(5), w, slots, (1.0, 1.0), settings, n, explore=1)
    pairs = rounds.every_pair(w, *slots, settings)
    np.testing.assert_allclose(pairs.sum(), 1, rtol=1e-5)

    seen = rounds.logps(
        log_policy, w.log_reference, data.prompt,
        chosen=data.chosen, rejected=data.rejected, explore=data.explore,
    )  # fmt: skip
    for objective, expected in (
        (
            dpo(1.0),
            rounds.mean_loss(dpo(1.0), log_policy, w.log_reference, rounds.as_examples(pairs)),
        ),
        (
            optimism(1.0),
            rounds.expected_bonus(optimism(1.0), w, w.log_reference, log_policy, w.log_reference),
        ),
    ):
        losses = np.asarray(objective(seen)[0])
        error = losses.std() / n**0.5
        assert abs(losses.mean() - expected) < 4 * error
        assert error < 0.05 * losses.std()


def test_bradley_terry_from_gumbel_noise(small):
    w, _ = small
    n, tau = 40_000, 0.3
    one = jnp.log(jnp.array([[1.0, 0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0, 0]]))
    two = jnp.log(jnp.array([[0, 0, 0, 1.0, 0, 0], [0, 1.0, 0, 0, 0, 0]]))
    data = rounds.sample(
        jax.random.key(3), w, (one, two), (1.0, 1.0), Settings(temperature=tau), n, explore=0
    )
    for x, (a, b) in enumerate([(0, 3), (2, 1)]):
        won = np.asarray(data.chosen)[np.asarray(data.prompt) == x] == a
        p = jax.nn.sigmoid((w.reward[x, a] - w.reward[x, b]) / tau)
        assert abs(won.mean() - p) < 4 * (p * (1 - p) / len(won)) ** 0.5
    np.testing.assert_array_equal(data.explore, jnp.where(data.prompt == 0, 0, 2))


def test_best_and_worst_of_many_without_noise(small):
    w, log_policy = small
    data = rounds.sample(
        jax.random.key(3), w, (log_policy,) * 4, (1.0,) * 4, Settings(temperature=0.0), 64, 2
    )
    better = w.reward[data.prompt, data.chosen], w.reward[data.prompt, data.rejected]
    assert np.all(better[0] >= better[1])
    explored = w.reward[data.prompt, data.explore]
    assert np.all((explored <= better[0]) & (explored >= better[1]))
    all_wrong = rounds.sample(
        jax.random.key(3), w, (log_policy,) * 4, (1.0,) * 4,
        Settings(temperature=0.0, flips=1.0), 64, 2,
    )  # fmt: skip
    np.testing.assert_array_equal(all_wrong.chosen, data.rejected)


def test_temperature_nought_is_the_most_probable_response(small):
    w, log_policy = small
    data = rounds.sample(
        jax.random.key(0), w, (log_policy, w.log_reference), (0.0, 1.0), Settings(), 32, explore=0
    )
    np.testing.assert_array_equal(data.explore, jnp.argmax(log_policy, axis=1)[data.prompt])


def test_replaced_data_forget(small):
    """With one query a round and the same key, only the newest pair counts."""
    once = dataclasses.replace(ZOO["dpo_online"], kept=False, slots=(REFERENCE, REFERENCE))
    length = Length(rounds=3, queries=4, steps=400)
    w, _ = small
    seen = jax.jit(lambda: rounds.run(jax.random.key(0), w, once, Settings(), length))()
    kept = replace(once, kept=True)
    other = jax.jit(lambda: rounds.run(jax.random.key(0), w, kept, Settings(), length))()
    np.testing.assert_allclose(seen.regret[0], other.regret[0], rtol=1e-5)
    assert seen.regret[2] != other.regret[2]
    assert exact.regret(w, w.log_reference) > 0
