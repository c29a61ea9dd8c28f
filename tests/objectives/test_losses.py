"""The losses against independent numpy forms, the paper's formulas and identities, and TRL.

`Item n` is a number of the checklist "what a faithful SELM must reproduce" that the tests follow;
equations are those of arXiv 2405.19332 v3.
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_losses import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.objectives import losses as L
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Logps, Objective, ObjectiveError, compose

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_losses.json").read_text())
# Of these TRL has no values: formulas.py is what they are held against.
FROM_FORMULAS = (
    "selm",
    "optimism",
    "vpo",
    "se_popo",
    "copo",
    "geb",
    "sppo",
    "ipo_online",
    "nash",
    "inpo",
)
CASES = [(trl, case) for trl, part in GOLDEN.items() for case in part["cases"]]

PAIR = ("dpo", "cdpo", "robust", "ipo", "hinge", "simpo")

seeds = st.integers(0, 2**32 - 1)
betas = st.floats(1e-3, 2.0)
alphas = st.just(0.0) | st.floats(1e-6, 1.0)


def random_logps(seed: int, examples: int = 5, dtype=jnp.float32) -> Logps:
    """Random log-probabilities of plausible size for responses of 1 to 60 tokens."""
    rng = np.random.default_rng(seed)
    lengths = {role: rng.integers(1, 60, examples).astype(float) for role in L.ROLES}
    policy = {role: -n * rng.uniform(0.2, 2.0, examples) for role, n in lengths.items()}
    reference = {role: p + rng.normal(0, 4, examples) for role, p in policy.items()}
    mean_lengths = {role: n.mean() for role, n in lengths.items()}
    scores = {role: rng.normal(0, 1, examples) for role in L.ROLES}
    bonus = rng.uniform(0, 2, examples)
    collision = {role: -n * rng.uniform(0.2, 2.0, examples) for role, n in lengths.items()}
    part = lambda of: {role: x * rng.uniform(0, 1, examples) for role, x in of.items()}
    shared = part(policy), part(reference)
    trees = (policy, reference, lengths, mean_lengths, scores, bonus, collision, *shared)
    return Logps(*jax.tree.map(lambda x: jnp.asarray(x, dtype), trees))


def gradient(objective: Objective, logps: Logps) -> Logps:
    """The gradient of the summed losses with respect to every number that the objective reads."""
    return jax.grad(lambda batch: objective(batch)[0].sum())(logps)


def with_policy(logps: Logps, **policy) -> Logps:
    return logps.replace(policy=logps.policy | policy)


# ---- the slow, obvious forms ---------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, beta=st.floats(1e-3, 0.3), alpha=alphas, e=st.floats(1e-3, 0.45))
def test_every_loss_equals_its_formula(name, seed, beta, alpha, e):  # Item 1
    logps = random_logps(seed)
    mine = {
        "beta": beta,
        "alpha": alpha,
        "label_smoothing": e,
        "gamma": 2 * e,
        "tau": e,
        "start_share": e,
        "ld_alpha": e,
    }
    mine = {key: mine[key] for key in EXAMPLES[name]}
    losses, metrics = build_objective(name, **mine)(logps)
    expected = formulas.each(name, logps, **mine)
    scale = max(1, np.abs(expected).max() if name == "nash" else 1)  # a difference of large numbers
    if name == "ipo_online":  # its root is a difference of margins of some hundred nats
        np.testing.assert_allclose(np.sqrt(losses), np.sqrt(expected), rtol=1e-5, atol=5e-5)
    else:
        np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-5 * scale)
    terms = [value for key, value in metrics.items() if key.startswith("loss/")]
    np.testing.assert_array_equal(sum(terms), losses)


@pytest.mark.parametrize("trl, case", CASES, ids=lambda x: x if isinstance(x, str) else x["name"])
def test_trl_gives_the_same(trl, case):
    arrays = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), case["logps"], is_leaf=lambda x: isinstance(x, list)
    )
    mean_lengths = {role: n.mean() for role, n in arrays["lengths"].items()}
    losses, metrics = build_objective(case["name"], **case["settings"])(
        Logps(**arrays, mean_lengths=mean_lengths)
    )
    assert float(losses.mean()) == pytest.approx(case["loss"], rel=1e-5)
    if "losses" in case:
        exponential = "f_divergence" in case["settings"]  # exp(-r) enlarges the rounding of r
        rtol = 2e-5 if exponential else 1e-5
        np.testing.assert_allclose(losses, case["losses"], rtol=rtol)
    for name, value in case["metrics"].items():
        if case["name"] == "sft" and name not in metrics:
            continue  # TRL reports rewards there too; without a beta of its own ours does not
        if case["name"] == "ld_dpo" and name.startswith("logps/"):
            continue  # TRL's are those that the loss uses; ours are of whole answers
        assert float(metrics[name].mean()) == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_golden_values_cover_the_forms_and_say_their_versions():
    assert {case["name"] for _, case in CASES} >= set(EXAMPLES) - set(FROM_FORMULAS)
    assert GOLDEN["trl 1.16.0"]["versions"]["trl"] == "1.16.0"


def test_ipo_of_sums():
    logps = random_logps(0)
    h = np.asarray(logps.log_ratio("chosen") - logps.log_ratio("rejected"), np.float64)
    losses, _ = build_objective("ipo", beta=0.5, length_normalized=False)(logps)
    np.testing.assert_allclose(losses, (h - 1.0) ** 2, rtol=1e-5)


# ---- what SELM must satisfy ----------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=seeds, beta=betas, alpha=alphas, convention=st.sampled_from(L.CONVENTIONS))
def test_the_first_loss_is_log_2(seed, beta, alpha, convention):  # Item 2
    logps = random_logps(seed)
    start = logps.replace(reference=logps.policy)
    losses, _ = build_objective("selm", beta=beta, alpha=alpha, convention=convention)(start)
    np.testing.assert_array_equal(losses, np.full(5, np.log(2), np.float32))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_alpha_0_is_dpo_to_the_bit(seed, compiled):  # Item 3
    logps = random_logps(seed, examples=64)

    def results(objective):
        function = lambda batch: (objective(batch)[0], gradient(objective, batch))
        losses, gradients = (jax.jit(function) if compiled else function)(logps)
        return losses, gradients.policy

    dpo, selm = (
        results(build_objective("dpo", beta=0.01)),
        results(build_objective("selm", beta=0.01, alpha=0.0)),
    )
    for left, right in zip(jax.tree.leaves(dpo), jax.tree.leaves(selm), strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.any(selm[1]["explore"])


@settings(max_examples=25, deadline=None)
@given(seed=seeds, beta=betas, alpha=alphas)
def test_gradient_by_log_probabilities(seed, beta, alpha):  # Item 4, as coded
    logps = random_logps(seed)
    h = np.asarray(logps.log_ratio("chosen") - logps.log_ratio("rejected"), np.float64)
    pull = beta * np.array([sigmoid(-beta * x) for x in h])
    found = gradient(build_objective("selm", beta=beta, alpha=alpha), logps).policy
    np.testing.assert_allclose(found["chosen"], -pull, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found["rejected"], pull, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found["explore"], np.full(5, alpha * beta), rtol=1e-6)


# The weights of the other two depend on the policy and have no gradient; see test_methods.py.
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in ("wpo", "copo")])
def test_gradient_against_finite_differences(name):  # Item 4
    with jax.enable_x64(True):
        logps = random_logps(1, dtype=jnp.float64)
        objective, step = build_objective(name, **EXAMPLES[name]), 1e-5
        found = gradient(objective, logps).policy
        for role in objective.roles:
            up = with_policy(logps, **{role: logps.policy[role] + step})
            down = with_policy(logps, **{role: logps.policy[role] - step})
            slope = (objective(up)[0] - objective(down)[0]) / (2 * step)
            np.testing.assert_allclose(found[role], slope, rtol=1e-6, atol=1e-9)


def test_descent_on_optimism_lowers_what_the_reference_says():  # Item 5
    theta = jnp.linspace(-1.0, 1.0, 6)
    y_ref = 4

    def loss(theta):
        policy = {"explore": jax.nn.log_softmax(theta)[None, y_ref]}
        logps = Logps(policy, {"explore": jnp.zeros(1)}, {}, {})
        return build_objective("optimism", beta=0.1, alpha=0.1)(logps)[0].sum()

    path = [theta]
    for _ in range(5):
        path.append(path[-1] - 10.0 * jax.grad(loss)(path[-1]))
    said = [float(jax.nn.log_softmax(theta)[y_ref]) for theta in path]
    assert all(after < before for before, after in pairwise(said))


@settings(max_examples=10, deadline=None)
@given(seed=seeds, shift=st.floats(-50.0, 50.0))
def test_a_constant_on_the_reference_moves_the_value_alone(seed, shift):  # Item 6
    logps = random_logps(seed)
    moved = logps.replace(
        reference=logps.reference | {"explore": logps.reference["explore"] + jnp.float32(shift)}
    )
    objective = build_objective("selm", beta=0.1, alpha=0.5)
    for left, right in zip(
        jax.tree.leaves(gradient(objective, logps).policy),
        jax.tree.leaves(gradient(objective, moved).policy),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    change = objective(moved)[0] - objective(logps)[0]
    np.testing.assert_allclose(change, np.full(5, -0.05 * shift), rtol=1e-4, atol=1e-5)


def test_both_conventions():  # Item 7
    logps = random_logps(0)
    paper = {"beta": 0.01, "alpha": 0.001}
    for extra, weight in (
        ({}, 1e-5),
        ({"convention": "alpha_beta"}, 1e-5),
        ({"convention": "alpha"}, 1e-3),
    ):
        for name in ("selm", "dpo+optimism"):
            found = gradient(build_objective(name, **paper, **extra), logps).policy["explore"]
            np.testing.assert_allclose(found, np.full(5, weight), rtol=1e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_gradient_through_the_reference(name):  # Item 10
    found = gradient(build_objective(name, **EXAMPLES[name]), random_logps(3))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.reference))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(found.policy))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_huge_margins_stay_finite(name, margin):  # Item 11
    zeros = jnp.zeros(2)
    policy = {"chosen": zeros + margin, "rejected": zeros, "explore": zeros + margin}
    ones = dict.fromkeys(L.ROLES, jnp.ones(2))
    of_role = dict.fromkeys(L.ROLES, zeros)
    means = dict.fromkeys(L.ROLES, jnp.ones(()))
    logps = Logps(
        policy, of_role, ones, means, of_role, jnp.ones(2), collision=policy,
        shared_policy=policy, shared_reference=of_role,
    )  # fmt: skip
    objective = build_objective(
        name, **(EXAMPLES[name] | ({"beta": 1.0} if "beta" in EXAMPLES[name] else {}))
    )
    losses, metrics = objective(logps)
    found = gradient(objective, logps)
    for leaf in jax.tree.leaves((losses, metrics, found)):
        assert np.all(np.isfinite(leaf))
    if name in ("dpo", "hinge", "simpo") and margin < 0:  # where the loss is a straight line
        np.testing.assert_allclose(found.policy["chosen"], [-1.0, -1.0])


# ---- a finite space, where expectations are sums -------------------------------------------------

SPACE = 7


def world(seed: int):
    """(reference log-probabilities, policy parameters) over SPACE responses to one prompt."""
    rng = np.random.default_rng(seed)
    return jax.nn.log_softmax(jnp.asarray(rng.normal(size=SPACE))), jnp.asarray(
        rng.normal(size=SPACE)
    )


def over_the_space(theta, log_ref, chosen, rejected, explore) -> Logps:
    """A batch of one example per element of the index arrays."""
    log_pi = jax.nn.log_softmax(theta)
    index = {"chosen": chosen, "rejected": rejected, "explore": explore}
    policy = {role: log_pi[i] for role, i in index.items()}
    reference = {role: log_ref[i] for role, i in index.items()}
    ones = {role: jnp.ones(i.shape) for role, i in index.items()}
    return Logps(policy, reference, ones, dict.fromkeys(L.ROLES, jnp.ones(())))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def best_policy(log_ref, reward, beta):
    """pi_r = pi_ref exp(r/beta) / Z, the maximiser of E[r] - beta KL(pi || pi_ref)."""
    return jax.nn.log_softmax(log_ref + reward / beta)


def inner_value(log_pi, log_ref, reward, beta):
    """F(pi; r) of equation 4.1."""
    pi, ref = jnp.exp(log_pi), jnp.exp(log_ref)
    return pi @ reward - ref @ reward - beta * pi @ (log_pi - log_ref)


@pytest.mark.parametrize("seed", range(5))
def test_the_inner_maximum_is_the_forward_kl(x64, seed):  # Item 8
    beta, (log_ref, reward) = 0.3, world(seed)
    log_pi = best_policy(log_ref, reward, beta)
    value = inner_value(log_pi, log_ref, reward, beta)
    kl = jnp.exp(log_ref) @ (log_ref - log_pi)
    np.testing.assert_allclose(value, beta * kl, rtol=1e-12)
    np.testing.assert_allclose(
        value,
        inner_value(best_policy(log_ref, reward + 5.0, beta), log_ref, reward + 5.0, beta),
        rtol=1e-10,
    )
    rng = np.random.default_rng(seed)
    for _ in range(20):  # and nothing else does better
        other = jax.nn.log_softmax(log_pi + jnp.asarray(rng.normal(size=SPACE)))
        assert inner_value(other, log_ref, reward, beta) <= value


@pytest.mark.parametrize("seed", range(5))
def test_optimism_is_minus_the_inner_maximum(
    x64, seed
):  # Item 8: how equation 4.2 follows from 4.1
    beta, alpha, (log_ref, theta) = 0.3, 0.2, world(seed)
    everything = jnp.arange(SPACE)
    logps = over_the_space(theta, log_ref, everything, everything, everything)
    losses, metrics = build_objective("optimism", beta=beta, alpha=alpha)(logps)
    kl = jnp.exp(log_ref) @ (log_ref - jax.nn.log_softmax(theta))
    np.testing.assert_allclose(jnp.exp(log_ref) @ losses, -alpha * beta * kl, rtol=1e-12)
    np.testing.assert_allclose(
        jnp.exp(log_ref) @ metrics["optimism/reward"], -beta * kl, rtol=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_two_gradients_of_equation_4_3_agree(x64, seed):  # Items 4 and 8
    beta, alpha, (log_ref, theta) = 0.3, 0.2, world(seed)
    everything, w, l = jnp.arange(SPACE), 1, 4
    pair = jnp.full(SPACE, w), jnp.full(SPACE, l)
    objective = build_objective("selm", beta=beta, alpha=alpha)

    def loss(theta):
        logps = over_the_space(theta, log_ref, *pair, everything)
        return jnp.exp(log_ref) @ objective(logps)[0]

    log_pi = jax.nn.log_softmax(theta)
    scores = jnp.eye(SPACE) - jnp.exp(log_pi)  # row y: the gradient of log pi(y) by theta
    reward = beta * (log_pi - log_ref)
    by_reference = jnp.exp(log_ref) @ scores
    by_policy = (jnp.exp(log_pi) * jnp.exp(-reward / beta)) @ scores
    np.testing.assert_allclose(by_reference, by_policy, rtol=1e-10, atol=1e-14)
    objective_gradient = (
        beta * jax.nn.sigmoid(reward[l] - reward[w]) * (scores[w] - scores[l])
        - alpha * beta * by_policy
    )
    np.testing.assert_allclose(jax.grad(loss)(theta), -objective_gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_the_least_rewarded_policy_is_the_reference(x64, seed):  # Item 8: theorem 5.1
    beta, (log_ref, theta) = 0.3, world(seed)
    log_rho = jax.nn.log_softmax(theta)
    everything = jnp.arange(SPACE)
    logps = over_the_space(theta, log_ref, everything, everything, everything)
    reward = build_objective("optimism", beta=beta, alpha=1.0)(logps)[1]["optimism/reward"]
    closed_form = jax.nn.log_softmax(log_rho - reward / beta)  # argmin E[r] + beta KL(. || rho)
    np.testing.assert_allclose(closed_form, log_ref, rtol=1e-10)

    def cost(log_pi):
        return jnp.exp(log_pi) @ (reward + beta * (log_pi - log_rho))

    rng = np.random.default_rng(seed)
    for _ in range(20):
        other = jax.nn.log_softmax(log_ref + jnp.asarray(rng.normal(size=SPACE)))
        assert cost(other) >= cost(log_ref)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_exploration_estimates_the_exact_expectation(x64, seed):  # Item 9
    log_ref, theta = world(seed)
    objective = build_objective("selm", beta=0.3, alpha=2.0)

    def losses(theta, explore):
        pair = jnp.full(explore.shape, 1), jnp.full(explore.shape, 4)
        return objective(over_the_space(theta, log_ref, *pair, explore))[0]

    drawn = np.random.default_rng(seed).choice(SPACE, 20_000, p=np.exp(log_ref))
    each, sampled = losses(theta, jnp.arange(SPACE)), losses(theta, jnp.asarray(drawn))
    exact = jnp.exp(log_ref) @ each
    assert abs(sampled.mean() - exact) < 4 * sampled.std() / math.sqrt(len(drawn))

    rows = jax.jacobian(losses)(theta, jnp.arange(SPACE))  # [explore, theta]
    error = 4 * rows[drawn].std(0) / math.sqrt(len(drawn))
    assert np.all(np.abs(rows[drawn].mean(0) - jnp.exp(log_ref) @ rows) <= error)


# ---- sums, metrics, batches ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PAIR, "sft"])
def test_every_loss_takes_optimism(name):  # Item 15
    logps = random_logps(4)
    mine = EXAMPLES[name]
    beta = mine.get("beta", 0.1)
    losses, metrics = build_objective(f"{name}+optimism", **(mine | {"beta": beta, "alpha": 0.01}))(
        logps
    )
    plain, plain_metrics = build_objective(name, **mine)(logps)
    term = 0.01 * beta * logps.log_ratio("explore")
    np.testing.assert_allclose(losses, plain + term, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/optimism"], term, rtol=1e-5)
    assert metrics.keys() == plain_metrics.keys() | {
        "loss/optimism",
        "optimism/reward",
        "logps/explore",
    }


def test_selm_is_the_sum_by_any_spelling():
    logps = random_logps(5)
    spellings = [
        build_objective("selm", beta=0.1, alpha=0.01),
        build_objective("dpo+optimism", beta=0.1, alpha=0.01),
        build_objective(" optimism + dpo ", beta=0.1, alpha=0.01),
        L.selm(0.1, 0.01),
        compose(L.dpo(0.1), L.optimism(0.001)),
    ]
    for objective in spellings:
        assert objective.roles == L.ROLES
        np.testing.assert_allclose(objective(logps)[0], spellings[0](logps)[0], rtol=1e-6)


@pytest.mark.parametrize("name", PAIR)
def test_metrics_have_trls_names_and_meaning(name):
    logps = random_logps(6)
    losses, metrics = build_objective(name, **EXAMPLES[name])(logps)
    beta = EXAMPLES[name]["beta"]
    for role in ("chosen", "rejected"):
        per_token = logps.policy[role] / logps.lengths[role]
        reward = beta * (per_token if name == "simpo" else logps.log_ratio(role))
        np.testing.assert_allclose(metrics[f"rewards/{role}"], reward, rtol=1e-6)
        np.testing.assert_array_equal(metrics[f"logps/{role}"], logps.policy[role])
    margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    np.testing.assert_array_equal(metrics["rewards/margins"], margins)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], np.asarray(margins) > 0)
    np.testing.assert_array_equal(metrics[f"loss/{name}"], losses)
    assert len(metrics) == 7


def test_roles_say_which_responses_the_batch_needs():
    assert build_objective("sft").roles == ("chosen",)
    assert build_objective("dpo", beta=0.1).roles == ("chosen", "rejected")
    assert build_objective("sft+optimism", beta=0.1, alpha=0.1).roles == ("chosen", "explore")
    logps = random_logps(0)
    only_pairs = logps.replace(policy={k: logps.policy[k] for k in ("chosen", "rejected")})
    build_objective("dpo", beta=0.1)(only_pairs)
    with pytest.raises(ObjectiveError, match=r"dpo\+optimism.*explore.*chosen.*rejected"):
        build_objective("selm", beta=0.1, alpha=0.1)(only_pairs)


def test_losses_are_per_example_so_microbatches_add_up():
    logps = random_logps(7, examples=9)
    for name, mine in EXAMPLES.items():
        objective = build_objective(name, **mine)
        parts = []
        for cut in (slice(0, 2), slice(2, 9)):
            cut_leaf = lambda x, cut=cut: x[cut] if x.ndim else x
            parts.append(objective(jax.tree.map(cut_leaf, logps))[0])
        np.testing.assert_allclose(
            jnp.concatenate(parts), objective(logps)[0], rtol=1e-5, atol=1e-6
        )


def test_sft_is_the_mean_over_tokens_not_over_examples():
    logps = random_logps(8)
    tokens = float(logps.lengths["chosen"].sum())
    losses, _ = build_objective("sft")(logps)
    np.testing.assert_allclose(losses.mean(), -logps.policy["chosen"].sum() / tokens, rtol=1e-6)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_empty_slot_of_the_batch_is_finite(name):
    """Rows are padded with examples of no tokens, weighted 0: a NaN there would still spread."""
    zeros = dict.fromkeys(L.ROLES, jnp.zeros(3))
    means = dict.fromkeys(L.ROLES, jnp.float32(7))
    logps = Logps(
        zeros, zeros, zeros, means, zeros, bonus=jnp.zeros(3), collision=zeros,
        shared_policy=zeros, shared_reference=zeros,
    )  # fmt: skip
    objective = build_objective(name, **EXAMPLES[name])
    for leaf in jax.tree.leaves((objective(logps), gradient(objective, logps))):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", ["selm", "ipo+optimism"])
def test_compiles_and_keeps_float32(name):
    objective = build_objective(name, beta=0.1, alpha=0.01)
    logps = random_logps(9)
    losses, metrics = jax.jit(objective)(logps)
    np.testing.assert_allclose(losses, objective(logps)[0], rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves((losses, metrics))} == {jnp.dtype("float32")}


# ---- names and settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, given_settings, words",
    [
        ("slem", {"beta": 0.1, "alpha": 0.1}, "unknown objective 'slem'.*did you mean 'selm'.*xpo"),
        ("ipo+optimsm", {"beta": 0.1, "alpha": 0.1}, "'optimsm'.*did you mean 'optimism'"),
        ("", {}, "unknown objective ''"),
        ("dpo+", {"beta": 0.1}, "unknown objective ''"),
        ("selm", {"beta": 0.1}, "selm needs the setting 'alpha'"),
        ("xpo", {"beta": 0.1}, "xpo needs the setting 'alpha'"),
        ("ipo+optimism", {"beta": 0.1}, "optimism needs the setting 'alpha'"),
        ("dpo", {}, "dpo needs the setting 'beta'"),
        ("dpo", {"beta": 0.1, "alpha": 0.1}, "has no setting 'alpha'.*It has: beta"),
        ("selm", {"betta": 0.1, "alpha": 0.1}, "no setting 'betta'.*did you mean 'beta'"),
        ("sft", {"beta": 0.1}, "no setting 'beta'. It has: none"),
        ("dpo", {"beta": 0}, "beta is 0; expected a number above 0"),
        ("dpo", {"beta": -0.1}, "beta is -0.1"),
        ("dpo", {"beta": float("nan")}, "beta is nan"),
        ("dpo", {"beta": float("inf")}, "beta is inf"),
        ("dpo", {"beta": True}, "beta is True"),
        ("dpo", {"beta": None}, "beta is None"),
        ("selm", {"beta": 0.1, "alpha": "1e-3"}, "alpha is '1e-3'; expected a number"),
        ("selm", {"beta": 0.1, "alpha": -1e-3}, "alpha is -0.001; expected a number of at least 0"),
        ("xpo", {"beta": 0.1, "alpha": -1e-3}, "alpha is -0.001"),
        (
            "selm",
            {"beta": 0.1, "alpha": 1, "convention": "beta"},
            "convention is 'beta'.*alpha_beta",
        ),
        ("robust", {"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing is 0.5.*below 0.5"),
        ("cdpo", {"beta": 0.1, "label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ("simpo", {"beta": 2.0, "gamma": -1}, "gamma is -1"),
        ("ipo", {"beta": 0.1, "length_normalized": "no"}, "length_normalized is 'no'"),
        ("dpo+dpo", {"beta": 0.1}, "names dpo twice"),
        ("selm+dpo", {"beta": 0.1, "alpha": 0.1}, r"dpo\+optimism\+dpo has a loss term twice"),
        (
            "dpo+simpo",
            {"beta": 0.1, "gamma": 0},
            "0.1 . log-ratio and 0.1 . log-probability per token",
        ),
    ],
)
def test_mistakes_are_told_kindly(name, given_settings, words):
    with pytest.raises(ObjectiveError, match=words):
        build_objective(name, **given_settings)


def test_the_error_is_a_value_error():
    assert issubclass(ObjectiveError, ValueError)


def test_two_meanings_of_one_metric_are_refused():
    with pytest.raises(ObjectiveError, match=r"0\.1 \* log-ratio and 0\.5 \* log-ratio"):
        compose(L.dpo(0.1), L.ipo(0.5))
    both = compose(L.dpo(0.1), L.ipo(0.1))  # one beta, one meaning
    assert {"loss/dpo", "loss/ipo", "rewards/chosen"} <= both(random_logps(0))[1].keys()

    def unsaid(logps):
        return logps.policy["chosen"], {"rewards/chosen": logps.policy["chosen"]}

    for order in (1, -1):
        parts = (L.dpo(0.1), Objective(("chosen",), unsaid))[::order]
        with pytest.raises(ObjectiveError, match="rewards/chosen"):
            compose(*parts)(random_logps(0))


@pytest.mark.parametrize("roles", [(), ("chosen", "middle")])
def test_unknown_roles_are_refused(roles):
    with pytest.raises(ObjectiveError, match="roles"):
        Objective(roles, lambda logps: (logps.policy["chosen"], {}))


def test_means_are_refused():
    def mean_loss(logps):
        return logps.policy["chosen"].mean(), {}

    def mean_metric(logps):
        return logps.policy["chosen"], {"mine": logps.policy["chosen"].mean()}

    with pytest.raises(
        ObjectiveError, match=r"mean_loss: the loss has shape \(\), expected \(5,\)"
    ):
        Objective(("chosen",), mean_loss)(random_logps(0))
    with pytest.raises(ObjectiveError, match="mean_metric: mine has shape"):
        Objective(("chosen",), mean_metric)(random_logps(0))


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    (tmp_path / "my_losses_for_test.py").write_text(
        "import jax.numpy as jnp\n"
        "from selm_jax.objectives.losses import Objective, dpo, compose\n"
        "def length_penalty(strength, floor=0.0):\n"
        "    def function(logps):\n"
        "        losses = strength * jnp.maximum(logps.lengths['chosen'], floor)\n"
        "        return losses, {'loss/length': losses}\n"
        "    return function\n"
        "def doubled(beta):\n"
        "    def function(logps):\n"
        "        losses, metrics = dpo(beta)(logps)\n"
        "        return 2 * losses, metrics\n"
        "    return Objective(('chosen', 'rejected'), function, ('doubled',))\n"
        "def nothing():\n"
        "    return 3\n"
        "number = 3\n"
    )
    (tmp_path / "my_broken_losses_for_test.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_losses_for_test"


def test_a_function_of_yours(my_module):
    logps = random_logps(0)
    objective = build_objective(f"{my_module}:length_penalty", strength=0.5)
    losses, metrics = objective(logps)
    np.testing.assert_allclose(losses, 0.5 * logps.lengths["chosen"])
    assert objective.roles == L.ROLES and metrics.keys() == {"loss/length"}

    objective = build_objective(f"{my_module}:doubled", beta=0.1)
    assert objective.roles == ("chosen", "rejected")
    np.testing.assert_allclose(objective(logps)[0], 2 * L.dpo(0.1)(logps)[0])


def test_a_function_of_yours_in_a_sum(my_module):
    logps = random_logps(0)
    objective = build_objective(
        f"selm+{my_module}:length_penalty", beta=0.1, alpha=0.01, strength=0.5, floor=9
    )
    expected = L.selm(0.1, 0.01)(logps)[0] + 0.5 * jnp.maximum(logps.lengths["chosen"], 9)
    np.testing.assert_allclose(objective(logps)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "path, given_settings, words",
    [
        ("no_such_module_at_all:f", {}, "No module named 'no_such_module_at_all'.*PYTHONPATH"),
        ("my_losses_for_test.deeper:f", {}, "No module named 'my_losses_for_test.deeper'"),
        (
            "my_losses_for_test:lenght_penalty",
            {},
            "has no 'lenght_penalty'; did you mean 'length_penalty'",
        ),
        ("my_losses_for_test:number", {}, "is a int; expected a Python function"),
        ("my_losses_for_test:nothing", {}, "returned 3; expected an Objective or a function"),
        ("my_losses_for_test:length_penalty", {}, "needs the setting 'strength'"),
        (
            "my_losses_for_test:doubled",
            {"beta": 1, "bta": 2},
            "no setting 'bta'.*did you mean 'beta'",
        ),
        (":f", {}, "expected the form 'package.module:function'"),
        ("./my_losses.py:f", {}, "./my_losses.py:f.*expected the form 'package.module:function'"),
    ],
)
def test_mistakes_in_a_path_are_told_kindly(my_module, path, given_settings, words):
    with pytest.raises(ObjectiveError, match=words):
        build_objective(path, **given_settings)


def test_a_fault_inside_your_module_is_not_hidden(my_module):
    with pytest.raises(ObjectiveError, match="No module named 'a_module_that_is_not_there'"):
        build_objective("my_broken_losses_for_test:f")
