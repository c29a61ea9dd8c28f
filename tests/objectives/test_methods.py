"""Every method in every variant: its formula, gradient, first value, and microbatches.

The summary at the end (`conftest.py`) lists each method with the source of its values and the
largest difference from them.
"""

import json
import math
from pathlib import Path

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_losses import EXAMPLES, VARIANTS

from selm_jax.objectives.build import REFUSED, TABLE, build_objective
from selm_jax.objectives.losses import Logps, ObjectiveError, copo
from selm_jax.objectives.roles import ROLES
from selm_jax.stages.score import mixed

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trl_losses.json").read_text())
CASES = [(trl, case) for trl, part in GOLDEN.items() for case in part["cases"]]
WEIGHTED = ("wpo", "copo")  # by numbers of the policy that have no gradient
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(VARIANTS)]


def batch(seed, examples=6):
    """Random float64 log-probabilities, of answers short and likely enough for exp(logp) to act."""
    rng = np.random.default_rng(seed)
    lengths = {role: rng.integers(1, 9, examples) * 1.0 for role in ROLES}
    policy = {role: -n * rng.uniform(0.05, 0.6, examples) for role, n in lengths.items()}
    reference = {role: p + rng.normal(0, 1, examples) for role, p in policy.items()}
    scores = {role: rng.normal(0, 1, examples) for role in ROLES}
    means = {role: n.mean() for role, n in lengths.items()}
    bonus = rng.uniform(0, 2, examples)
    collision = {role: -n * rng.uniform(0.05, 0.9, examples) for role, n in lengths.items()}
    part = lambda of: {role: x * rng.uniform(0, 1, examples) for role, x in of.items()}
    shared = part(policy), part(reference)
    parts = (policy, reference, lengths, means, scores, bonus, collision, *shared)
    return Logps(*jax.tree.map(jnp.asarray, parts))


def largest_difference(found, expected):
    return float(np.max(np.abs(found - expected) / (1e-3 + np.abs(expected))))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name, given", VARIANTS, ids=IDS)
def test_formula(x64, name, given, record_property):
    found = 0.0
    for seed in range(5):
        logps = batch(seed)
        expected = formulas.each(name, logps, **given)
        np.testing.assert_allclose(build_objective(name, **given)(logps)[0], expected, rtol=1e-9)
        float32 = jax.tree.map(lambda x: x.astype(jnp.float32), logps)
        losses, _ = build_objective(name, **given)(float32)
        found = max(found, largest_difference(losses, expected))
    record_property("parity", (name, "formula in float64", found))
    assert found < 1e-3


@pytest.mark.parametrize("trl, case", CASES, ids=lambda x: x if isinstance(x, str) else x["name"])
def test_recorded_values(trl, case, record_property):
    of = lambda part: {role: jnp.asarray(x, jnp.float32) for role, x in case["logps"][part].items()}
    means = {role: n.mean() for role, n in of("lengths").items()}
    logps = Logps(of("policy"), of("reference"), of("lengths"), means)
    for more in ("collision", "shared_policy", "shared_reference"):
        if more in case["logps"]:
            logps = logps.replace(**{more: of(more)})
    losses, _ = build_objective(case["name"], **case["settings"])(logps)
    found = largest_difference(losses.mean(), case["loss"])
    if "losses" in case:
        found = max(found, largest_difference(losses, np.array(case["losses"])))
    record_property("parity", (case["name"], trl.upper(), found))
    assert found < 2e-5


def test_copo(x64, record_property):
    logps = batch(3)
    losses, _ = copo(0.1, 0.01)(logps)
    expected = formulas.each("copo", logps, beta=0.1, alpha=0.01)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    record_property("parity", ("copo", "formula in float64", largest_difference(losses, expected)))
    slope = jax.grad(lambda x: copo(0.1, 0.01)(x)[0].sum())(logps).policy["explore"]
    weight = np.minimum(np.exp(logps.log_ratio("explore")), 5) * logps.bonus / 10
    np.testing.assert_allclose(slope, -0.01 * weight, rtol=1e-9)  # none through the weight
    with pytest.raises(ObjectiveError, match="a count bonus for each example"):
        copo(0.1, 0.01)(logps.replace(bonus=None))
    start = logps.replace(reference=logps.policy)
    first = math.log(2) - 0.01 * 0.1 * logps.bonus * logps.policy["explore"]
    np.testing.assert_allclose(copo(0.1, 0.01)(start)[0], first, rtol=1e-12)
    assert build_objective("copo+0.1*sft", beta=0.1, alpha=0.01, bits=8).bonus_bits == 8
    with pytest.raises(ObjectiveError, match="bits is 0"):
        copo(0.1, 0.01, bits=0)


def test_the_weights_of_wpo_have_no_gradient_and_are_asked_for(x64):
    logps = batch(3)
    slopes, (losses, metrics) = [], build_objective("wpo", beta=0.1)(logps)
    for name in ("wpo", "dpo"):
        objective = build_objective(name, beta=0.1)
        found = jax.grad(lambda x, of=objective: of(x)[0].sum())(logps)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.collision))
        slopes.append(found.policy["chosen"])
    np.testing.assert_allclose(slopes[0], metrics["wpo/weight"] * slopes[1], rtol=1e-9)
    with_sft = build_objective("wpo+0.2*sft", beta=0.1)
    assert with_sft.uses_collision and not build_objective("dpo", beta=0.1).uses_collision
    np.testing.assert_allclose(
        with_sft(logps)[0], losses + 0.2 * build_objective("sft")(logps)[0], rtol=1e-9
    )
    with pytest.raises(ObjectiveError, match=r"wpo\+sft needs Logps.collision"):
        with_sft(logps.replace(collision={}))


@pytest.mark.parametrize(
    "name, given",
    [each for each in VARIANTS if each[0] not in WEIGHTED],
    ids=[each for each in IDS if each.split("-")[0] not in WEIGHTED],
)
def test_gradient(x64, name, given):
    objective, logps, step = build_objective(name, **given), batch(1), 1e-6
    found = jax.grad(lambda x: objective(x)[0].sum())(logps)
    for of in (found.reference, found.shared_reference):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(of))
    for part in ("policy", "shared_policy") if objective.uses_shared else ("policy",):
        given_now = getattr(logps, part)
        for role in objective.roles:
            up, down = (
                objective(logps.replace(**{part: given_now | {role: given_now[role] + d}}))[0]
                for d in (step, -step)
            )
            np.testing.assert_allclose(
                getattr(found, part)[role], (up - down) / (2 * step), rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("name, given", VARIANTS, ids=IDS)
def test_microbatches_add_up(x64, name, given):
    objective, logps = build_objective(name, **given), batch(2)
    parts = [
        objective(jax.tree.map(lambda x, cut=cut: x[cut] if x.ndim else x, logps))[0]
        for cut in (slice(0, 1), slice(1, 6))
    ]
    np.testing.assert_allclose(jnp.concatenate(parts), objective(logps)[0], rtol=1e-12)


LOG2 = math.log(2)
FIRST = {
    **dict.fromkeys(("dpo", "cdpo", "robust", "sigmoid_norm", "selm", "vpo", "se_popo"), LOG2),
    "ld_dpo": LOG2,
    "hinge": 1,
    **dict.fromkeys(("ipo", "inpo"), 1 / (4 * 0.2**2)),
    "exo_pair": -LOG2 - (math.log(0.8) + math.log(0.2)) / 2,
    "discopop": (LOG2 + 1) / 2,
    "nca_pair": 2 * LOG2,
    "bco_pair": 2 * LOG2,
    "apo_zero": 1,
    "apo_down": 1,
    "optimism": 0,
    "sppo_hard": 1 / (2 * 0.1**2),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_loss(x64, name):
    """Where the policy is the reference, whatever the log-probabilities and the divergence are."""
    logps = batch(4)
    start = logps.replace(reference=logps.policy, shared_reference=logps.shared_policy)
    for each, given in VARIANTS:
        if each == name:
            losses, _ = build_objective(name, **given)(start)
            np.testing.assert_allclose(losses, np.full(6, FIRST[name]), rtol=1e-12, atol=1e-15)


def test_a_first_loss_that_is_not_listed_depends_on_the_answers():
    others = {"simpo", "sft", "wpo", "xpo", "copo", "geb", "sppo", "ipo_online", "nash"}
    assert EXAMPLES.keys() - FIRST == others


def test_the_first_loss_of_wpo_is_its_weight_times_log_2(x64):
    logps = batch(4)
    losses, metrics = build_objective("wpo", beta=0.1)(logps.replace(reference=logps.policy))
    np.testing.assert_allclose(losses, LOG2 * metrics["wpo/weight"], rtol=1e-12)
    typical = {role: logps.policy[role] for role in ROLES}  # p(token) = sum of squares
    losses, _ = build_objective("wpo", beta=0.1)(
        logps.replace(reference=logps.policy, collision=typical)
    )
    np.testing.assert_allclose(losses, np.full(6, LOG2), rtol=1e-12)


# ---- how methods are combined, and which are refused ---------------------------------------------


def test_weights_of_terms():
    logps = batch(5)
    objective = build_objective("dpo + 0.2*sft + -1e-2*optimism", beta=0.1, alpha=0.5)
    losses, metrics = objective(logps)
    parts = [build_objective(n, **EXAMPLES[n])(logps)[0] for n in ("dpo", "sft")]
    term = build_objective("optimism", beta=0.1, alpha=0.5)(logps)[0]
    np.testing.assert_allclose(losses, parts[0] + 0.2 * parts[1] - 0.01 * term, rtol=1e-5)
    np.testing.assert_allclose(sum(v for k, v in metrics.items() if k[:5] == "loss/"), losses)
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.1 * logps.log_ratio("chosen"))
    for wrong in ("x*dpo", "nan*dpo", "*dpo"):
        with pytest.raises(ObjectiveError, match="weight|no weight"):
            build_objective(wrong, beta=0.1)


@pytest.mark.parametrize("name", ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_another_divergence_is_refused_where_it_would_not_cancel(name):
    """TRL 1.16 refuses the same, and aot and aot_unpaired, which are not here."""
    with pytest.raises(ObjectiveError, match=r"has no setting 'f_divergence'"):
        build_objective(name, beta=0.1, f_divergence="forward_kl")
    with pytest.raises(ObjectiveError, match=f"{name} has no form for f_divergence"):
        build_objective(f"dpo+{name}", beta=0.1, f_divergence="forward_kl")
    build_objective(f"dpo+{name}", beta=0.1, f_divergence="reverse_kl")
    build_objective("dpo+sft", beta=0.1, f_divergence="forward_kl")


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_an_update_cannot_have_are_refused_with_the_reason(name):
    reason = "accumulated from microbatches"
    if name == "egpo":
        reason = "samples new answers.* name `nash`, with feedback.explore: sample$"
    for asked in (name, f"dpo+0.1*{name}"):
        with pytest.raises(ObjectiveError, match=f"objective {name} is not here: .*{reason}"):
            build_objective(asked, beta=0.1)
    assert name not in TABLE


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("exo_pair", {"beta": 0.1, "label_smoothing": 0}, "above 0 and below 0.5"),
        ("dpo", {"beta": 0.1, "f_divergence": "kl"}, "expected reverse_kl or forward_kl or"),
        ("vpo", {"beta": 0.1, "alpha": 0.1, "sign": 1}, "expected optimistic or pessimistic"),
        ("geb", {"beta": 0.1, "alpha": 0.1, "atom": "log"}, "complement or inverse or arctanh"),
        ("ipo", {"beta": 0.1, "length_normalized": 1}, "expected true or false"),
    ],
)
def test_choices_are_checked(name, given, words):
    with pytest.raises(ObjectiveError, match=words):
        build_objective(name, **given)


@pytest.mark.parametrize("name", ["sppo", "ipo_online", "nash", "dpo+sppo"])
def test_scores_are_asked_for(name):
    objective = build_objective(name, beta=0.1)
    assert objective.uses_scores and not build_objective("dpo", beta=0.1).uses_scores
    with pytest.raises(ObjectiveError, match="needs the ranker's scores"):
        objective(batch(1).replace(scores={}))


def test_inpo(x64):
    """Its paper's h_t, with both references, is the margin over the reference that a run stores."""
    logps, rng, eta, tau = batch(7), np.random.default_rng(7), 0.2, 0.05
    start, before = (
        logps.reference,
        {r: x + rng.normal(0, 1, 6) for r, x in logps.reference.items()},
    )
    stored = {
        role: np.array(
            [
                one
                for (one,) in mixed(
                    [(x,) for x in before[role]], [(x,) for x in start[role]], tau / eta
                )
            ]
        )
        for role in ROLES
    }
    gap = lambda of: of["chosen"] - of["rejected"]
    h = gap(logps.policy) - tau / eta * gap(start) - (eta - tau) / eta * gap(before)
    objective = build_objective("inpo", beta=eta, start_share=tau / eta)
    assert objective.start_share == 0.25
    losses, _ = objective(logps.replace(reference=stored))
    np.testing.assert_allclose(losses, (h - 1 / (2 * eta)) ** 2, rtol=1e-12)
    with_sft = build_objective("inpo+0.2*sft", beta=eta)
    assert with_sft.start_share == 1 / 3 and build_objective("dpo", beta=0.1).start_share == 0
    with pytest.raises(ObjectiveError, match="inpo compares with a mixture of two references"):
        build_objective("inpo+ipo_online", beta=eta)
    with pytest.raises(ObjectiveError, match="start_share is 2"):
        build_objective("inpo", beta=eta, start_share=2)


def test_tails_that_count_in_full_or_not_at_all(x64):
    logps, beta = batch(6), 0.1
    dpo = build_objective("dpo", beta=beta)
    whole = build_objective("ld_dpo", beta=beta, ld_alpha=1)
    np.testing.assert_array_equal(whole(logps)[0], dpo(logps)[0])
    cut = logps.replace(policy=logps.shared_policy, reference=logps.shared_reference)
    found, metrics = build_objective("ld_dpo", beta=beta, ld_alpha=0)(logps)
    np.testing.assert_allclose(found, dpo(cut)[0], rtol=1e-12)
    np.testing.assert_allclose(metrics["rewards/chosen"], beta * cut.log_ratio("chosen"))
    np.testing.assert_array_equal(metrics["logps/chosen"], logps.policy["chosen"])


def test_ld_dpo_is_summed_where_nothing_else_reports_rewards_and_asks_for_what_it_needs(x64):
    """Other terms of a sum keep whole answers."""
    logps, given = batch(6), {"beta": 0.1, "ld_alpha": 0.3}
    both = build_objective("ld_dpo+0.2*sft+optimism", **given, alpha=0.5)
    assert both.uses_shared and not build_objective("dpo", beta=0.1).uses_shared
    parts = [build_objective("ld_dpo", **given), build_objective("sft")]
    parts += [build_objective("optimism", beta=0.1, alpha=0.5)]
    first, second, third = (part(logps)[0] for part in parts)
    np.testing.assert_allclose(both(logps)[0], first + 0.2 * second + third, rtol=1e-12)
    with pytest.raises(ObjectiveError, match="rewards/... would mean both"):
        build_objective("ld_dpo+dpo", **given)
    with pytest.raises(ObjectiveError, match="inpo compares with a mixture of two|would mean both"):
        build_objective("ld_dpo+inpo", **given)
    with pytest.raises(ObjectiveError, match="ld_dpo needs Logps.shared_policy"):
        parts[0](logps.replace(shared_policy={}, shared_reference={}))
    with pytest.raises(ObjectiveError, match="ld_alpha is 1.5"):
        build_objective("ld_dpo", beta=0.1, ld_alpha=1.5)


def test_sums_that_are_other_methods(x64):
    logps = batch(6)
    same = lambda a, b, rtol=1e-12: np.testing.assert_allclose(a(logps)[0], b(logps)[0], rtol=rtol)
    beta, alpha = 0.1, 0.03
    selm = build_objective("selm", beta=beta, alpha=alpha)
    same(build_objective("vpo", beta=beta, alpha=alpha), selm)
    down = build_objective("dpo+-1*optimism", beta=beta, alpha=alpha)
    same(build_objective("vpo", beta=beta, alpha=alpha, sign="pessimistic"), down)
    sure = {"chosen": 0 * logps.scores["chosen"] + 60, "rejected": 0 * logps.scores["chosen"]}
    logps = logps.replace(scores=logps.scores | sure)
    sums = build_objective("ipo", beta=beta, length_normalized=False)
    same(build_objective("ipo_online", beta=beta), sums)
    same(build_objective("sppo", beta=beta), build_objective("0.5*sppo_hard", beta=beta))


def test_the_bonus_of_geb_has_no_gradient_for_a_long_answer_unless_it_is_a_mean():
    logps = batch(7)
    long = {role: -120.0 - jnp.arange(6.0) for role in ROLES}
    logps = logps.replace(
        policy=long, reference=long, lengths={r: 0 * p + 60 for r, p in long.items()}
    )
    for atom in ("complement", "arctanh"):
        slopes = [
            jax.grad(
                lambda x, mean=mean, atom=atom: build_objective(
                    "geb", beta=0.1, alpha=1.0, atom=atom, length_normalized=mean
                )(x)[0].sum()
            )(logps).policy["explore"]
            for mean in (False, True)
        ]
        assert not np.any(slopes[0]) and np.all(slopes[1] > 1e-3)


def test_se_popo_is_bounded(x64):
    logps = batch(8)
    far = logps.replace(policy=logps.policy | {"explore": logps.policy["explore"] - 1e6})
    objective = build_objective("se_popo", beta=0.1, alpha=0.01)
    term = objective(far)[1]["loss/se_popo"]
    np.testing.assert_allclose(term, np.full(6, -0.01 * 0.5 / 0.1))
