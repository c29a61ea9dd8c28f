"""What is measured of every objective is what the losses report themselves where they do."""

import jax.numpy as jnp
import numpy as np
import pytest
from example_losses import EXAMPLES

from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Logps, Objective, Rewards
from selm_jax.objectives.measures import measures
from selm_jax.objectives.roles import PAIR, ROLES


def random_logps(seed: int) -> Logps:
    rng = np.random.default_rng(seed)
    policy, reference = (
        {role: jnp.asarray(rng.normal(-40, 4, 5), jnp.float32) for role in ROLES} for _ in "pr"
    )
    lengths = {role: jnp.full(5, 20.0) for role in ROLES}
    means = {role: jnp.float32(20) for role in ROLES}
    bonus = jnp.ones_like(policy["chosen"])
    return Logps(
        policy, reference, lengths, means, reference, bonus, collision=reference,
        shared_policy=policy, shared_reference=reference,  # no answer has a tail
    )  # fmt: skip


def of_a_loss_that_reports_nothing(beta: float):
    return Objective(ROLES, lambda logps: (logps.log_ratio("explore") ** 2, {}), beta=beta)


@pytest.mark.parametrize("name", EXAMPLES)
def test_measures_are_what_the_losses_report(name):
    objective, logps = build_objective(name, **EXAMPLES[name]), random_logps(3)
    reported, measured = objective(logps)[1], measures(logps, objective)
    both = set(reported) & set(measured)
    assert both >= {f"logps/{role}" for role in objective.roles}
    if name not in ("simpo", "sft", "optimism"):
        assert both >= {"rewards/chosen", "rewards/margins", "rewards/accuracies"}
    rounding = 1e-5 if objective.uses_shared else 0  # its rewards are sums of two parts
    for key in both:
        np.testing.assert_allclose(reported[key], measured[key], rtol=rounding, err_msg=key)


def test_a_loss_that_reports_nothing_has_every_measure():
    logps = random_logps(4)
    found = measures(logps, of_a_loss_that_reports_nothing(0.3))
    ratio = {role: logps.policy[role] - logps.reference[role] for role in ROLES}
    assert set(found) == {
        *(f"{kind}/{role}" for kind in ("logps", "log_ratios", "rewards") for role in ROLES),
        *("rewards/margins", "rewards/accuracies"),
    }
    for role in ROLES:
        np.testing.assert_allclose(found[f"log_ratios/{role}"], ratio[role], rtol=1e-6)
        np.testing.assert_allclose(found[f"rewards/{role}"], 0.3 * ratio[role], rtol=1e-6)
    right = np.asarray(ratio["chosen"] > ratio["rejected"])
    np.testing.assert_array_equal(found["rewards/accuracies"], right.astype(np.float32))


@pytest.mark.parametrize("name", ["sft", "simpo"])
def test_what_looks_at_no_reference_has_no_log_ratios(name):
    objective = build_objective(name, **EXAMPLES[name])
    assert {key.split("/")[0] for key in measures(random_logps(1), objective)} == {"logps"}


def test_a_reward_model_is_measured_by_its_rewards():
    model = {"chosen": jnp.array([1.0, 2.0, 0.0]), "rejected": jnp.array([0.5, 3.0, 0.0])}
    batch = Rewards(model, {role: jnp.zeros(3) for role in PAIR})
    objective = build_objective("bradley_terry")
    reported, measured = objective(batch)[1], measures(batch, objective)
    for key in set(reported) - {"loss/bradley_terry"}:
        np.testing.assert_array_equal(reported[key], measured[key], err_msg=key)
    np.testing.assert_array_equal(measured["rewards/accuracies"], [1, 0, 0.5])


def test_beta_of_the_settings_scales_the_rewards():
    assert build_objective("dpo", beta=0.25).beta == 0.25
    assert build_objective("dpo+optimism", beta=0.5, alpha=0.1).beta == 0.5
    assert build_objective("sft").beta == 1.0
