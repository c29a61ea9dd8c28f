"""The update: exact means whatever the microbatches and the mesh, and what its parts promise."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from example_losses import EXAMPLES
from jax.sharding import NamedSharding, PartitionSpec

from selm_jax.models.config import Mixture
from selm_jax.models.decoder import Decoder, abstract_params
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Objective, ObjectiveError, copo
from selm_jax.objectives.roles import ROLES
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, partition, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.novelty import with_bonuses
from selm_jax.preferences.packing import Shape, pack, unpack, unpack_tokens
from selm_jax.run.task import task_of
from selm_jax.stages.score import with_shared
from selm_jax.training.optimizer import OPTIMIZERS, learning_rate, optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import Shardings, _means, by_role, loss_sums, make_update, of_scored

# One shape for all tests: each further shape costs a compilation.
SHAPE = Shape(rows=8, time=64, scored=64, segments=8, branches=3)
SETTINGS = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.0}


def some_examples(count: int = 16, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def some(low, high):
        return tuple(int(x) for x in rng.integers(0, 96, rng.integers(low, high)))

    return [
        Example(
            f"x{i}",
            some(2, 7),
            tuple(some(1, 9) for _ in range(3)),
            {"chosen": 0, "rejected": 1, "explore": int(rng.integers(3))},
            tuple(rng.uniform(-30, -5, 3).astype(np.float32)),
        )
        for i in range(count)
    ]


def mean_lengths(examples) -> np.ndarray:
    means = [np.mean([len(e.responses[e.roles[role]]) for e in examples]) for role in ROLES]
    return np.array(means, np.float32)


def totals(update, params, batches, examples, *live):
    """Gradients and sums over all microbatches."""
    means = mean_lengths(examples)
    first, *rest = batches
    gradients, sums = update.gradients(params, first, means, *live)
    for batch in rest:
        gradients, sums = update.add(gradients, sums, params, batch, means, *live)
    return gradients, sums


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.fixture(scope="module")
def world(tiny, random_params):
    """world(loss) is the compiled update of a loss on one device and its optimiser."""
    decoder = Decoder(tiny(layers=1))

    @cache
    def made(loss: str):
        settings = {"selm": {"beta": 0.1, "alpha": 0.2}, "sft": {}}[loss]
        step = optimizer("adamw", **SETTINGS)
        return make_update(
            decoder, build_objective(loss, **settings), step, chunk=16, clip=1.0
        ), step

    def fresh(seed: int = 0):
        return jax.tree.map(jnp.copy, random_params(decoder.config, seed))

    made.fresh, made.decoder = fresh, decoder
    return made


def scored(update, params, examples):
    """The examples with their log-probabilities under `params` as reference."""
    batches = pack(examples, SHAPE)
    found = unpack(examples, SHAPE, [np.asarray(update.logps(params, b)) for b in batches])
    return [dataclasses.replace(e, reference_logps=r) for e, r in zip(examples, found, strict=True)]


def tokens_of(update, params, examples):
    """The log-probabilities of each response's tokens under `params`."""
    batches = pack(examples, SHAPE)
    found = [np.asarray(update.logps_by_token(params, batch)[1]) for batch in batches]
    return unpack_tokens(examples, SHAPE, found)


# --- methods -----------------------------------------------------------------------------------


@pytest.mark.slow_except("dpo", "selm", "nash", "inpo", "sft", "ipo", "geb", "copo")
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_method_trains_by_one_line_of_an_experiment(name, tiny, random_params):
    decoder, step = Decoder(tiny(layers=1)), optimizer("adamw", **SETTINGS)
    objective = task_of({"loss": name} | EXAMPLES[name]).objective
    update = make_update(decoder, objective, step, chunk=16, clip=1.0)
    params = jax.tree.map(jnp.copy, random_params(decoder.config, 0))  # `apply` donates them
    scores = np.random.default_rng(1).normal(size=(8, 3))
    examples = [
        dataclasses.replace(e, scores=tuple(s))
        for e, s in zip(scored(update, params, some_examples(8)), scores, strict=True)
    ]
    if objective.uses_shared:
        examples = with_shared(examples, tokens_of(update, params, examples))
    if objective.bonus_bits:
        examples = with_bonuses(examples, objective.bonus_bits)
    gradients, sums = totals(update, params, pack(examples, SHAPE), examples)
    before = jax.tree.map(np.array, params)
    state, metrics = update.apply(TrainState(0, params, step.init(params)), gradients, sums, 1e-3)
    assert all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda a, b: np.any(a != b), before, state.params)
    assert any(jax.tree.leaves(moved))


def test_the_weights_of_wpo_are_those_of_the_whole_logits(tiny, random_params):
    """Of three packed rows against plain logits, response by response."""
    decoder = Decoder(tiny(layers=1))
    params, examples = random_params(decoder.config, 0), some_examples(8)
    (batch,) = pack(examples, SHAPE)

    def excess(hidden, targets, unembedding, *_, **__):
        table = jax.nn.log_softmax(hidden @ unembedding.T, axis=-1)
        own = jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(2 * table, axis=-1)

    each = unpack_tokens(
        examples, SHAPE, [np.asarray(of_scored(excess, decoder, params, batch, 1)[0])]
    )
    pairs = [(of[0].mean(), of[1].mean()) for of in each]
    _, sums = loss_sums(
        params, batch, mean_lengths(examples), decoder=decoder, chunk=16,
        objective=build_objective("wpo", beta=0.1),
    )  # fmt: skip
    np.testing.assert_allclose(sums["wpo/weight"], np.exp(np.sum(pairs, axis=1)).sum(), rtol=1e-4)


def test_ld_dpo_weighs_the_tokens_beyond_the_shorter_answer(tiny, random_params):
    """Of packed rows against sums by hand; with stored and live references, in any microbatches."""
    decoder = Decoder(tiny(layers=1))
    objective = build_objective("ld_dpo", beta=0.1, ld_alpha=0.3)
    update = make_update(decoder, objective, optimizer("adamw", **SETTINGS), chunk=16)
    params, reference = (random_params(decoder.config, seed) for seed in (0, 5))
    examples = some_examples()
    policy, of_reference = (tokens_of(update, each, examples) for each in (params, reference))

    def ratio(mine, theirs, role, example):
        k, n = example.roles[role], min(map(len, example.responses[:2]))
        gap = np.asarray(mine[k], np.float64) - theirs[k]
        return gap[:n].sum() + 0.3 * gap[n:].sum()

    margins = [
        ratio(*both, "chosen", e) - ratio(*both, "rejected", e)
        for *both, e in zip(policy, of_reference, examples, strict=True)
    ]
    expected = np.log1p(np.exp(-0.1 * np.array(margins))).sum()
    ready = with_shared(scored(update, reference, examples), of_reference)
    found = totals(update, params, pack(ready, SHAPE), examples)
    assert float(found[1]["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(found[1]["rewards/margins"]) == pytest.approx(0.1 * sum(margins), rel=1e-3)
    live = totals(update, params, pack(examples, SHAPE), examples, reference)
    assert_close(live, found, rtol=1e-4, atol=1e-5)
    cuts = [0, 5, 16]
    parts = [b for i, j in pairwise(cuts) for b in pack(ready[i:j], SHAPE)]
    assert_close(totals(update, params, parts, examples), found, rtol=1e-4, atol=1e-5)
    with pytest.raises(ObjectiveError, match="Score them again"):
        update.gradients(params, pack(examples, SHAPE)[0], mean_lengths(examples))
    itself = with_shared(scored(update, params, examples), policy)
    _, first = totals(update, params, pack(itself, SHAPE), examples)
    assert float(first["loss"]) == pytest.approx(16 * math.log(2), rel=1e-6)


# --- means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["selm", "sft"])
def test_microbatches_are_one_big_batch(loss, world):
    update, step = world(loss)
    examples = some_examples()
    results = []
    for cuts in ([0, 16], [0, 11, 16], [0, 7, 14, 16]):
        batches = [b for i, j in pairwise(cuts) for b in pack(examples[i:j], SHAPE)]
        assert len(batches) == len(cuts) - 1
        params = world.fresh()
        gradients, sums = totals(update, params, batches, examples)
        state = TrainState.create(params, step)
        results.append(update.apply(state, gradients, sums, np.float32(0.01)))
    (one, one_metrics), *others = results
    assert one_metrics["examples"] == len(examples)
    for state, metrics in others:
        assert_close(metrics, one_metrics)
        assert_close(state.params, one.params)


def test_packed_pairs_are_weighted_equally_whatever_the_packing(world):
    """A short pair beside long ones counts as much as alone in its row."""
    update, _ = world("selm")
    examples, params = some_examples(8, seed=5), world.fresh()
    alone = [totals(update, params, pack([e], SHAPE), examples) for e in examples]
    expected = jax.tree.map(lambda *each: sum(each), *alone)
    orders = [examples, sorted(examples, key=lambda e: e.tokens), examples[1::2] + examples[::2]]
    cuts = [[0, 8], [0, 1, 8], [0, 3, 5, 8]]
    for order, cut in zip(orders, cuts, strict=True):
        batches = [b for i, j in pairwise(cut) for b in pack(order[i:j], SHAPE)]
        found = totals(update, params, batches, examples)
        assert float(found[1]["examples"]) == 8
        assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_responses_that_explore_together_give_the_mean_of_each_alone(world):
    """One of them drawn twice counts twice; the pair's term is as before."""
    update, _ = world("selm")
    params = world.fresh()
    examples = scored(update, params, some_examples())
    shifted = [
        dataclasses.replace(e, reference_logps=tuple(r + 1 for r in e.reference_logps))
        for e in examples
    ]
    explored = (2, 0, 2, 1)
    together = [dataclasses.replace(e, explored=explored) for e in shifted]
    found = totals(update, params, pack(together, SHAPE), together)
    alone = []
    for place in explored:
        one = [dataclasses.replace(e, roles={**e.roles, "explore": place}) for e in shifted]
        alone.append(totals(update, params, pack(one, SHAPE), one))
    mean = jax.tree.map(lambda *x: sum(x) / len(explored), *alone)
    assert_close(found, mean, rtol=1e-4, atol=1e-5)
    ((_, sums), (_, other), *_) = alone
    assert float(sums["logps/explore"]) != pytest.approx(float(other["logps/explore"]))


def test_the_loss_of_sft_is_the_mean_over_tokens(world):
    update, _ = world("sft")
    examples = some_examples()
    params = world.fresh()
    _, sums = totals(update, params, pack(examples, SHAPE), examples)
    chosen = sum(float(e.reference_logps[0]) for e in scored(world("selm")[0], params, examples))
    tokens = sum(len(e.responses[0]) for e in examples)
    np.testing.assert_allclose(sums["loss"] / sums["examples"], -chosen / tokens, rtol=1e-5)


def test_metrics_are_means_over_examples(world):
    update, step = world("selm")
    examples = some_examples()
    params = world.fresh()
    logps = [e.reference_logps for e in scored(update, params, examples)]
    gradients, sums = totals(update, params, pack(examples, SHAPE), examples)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
    _, metrics = update.apply(TrainState.create(params, step), gradients, sums, np.float32(0))

    def ratio(role):
        each = zip(logps, examples, strict=True)
        return np.array([p[e.roles[role]] - e.reference_logps[e.roles[role]] for p, e in each])

    margin = 0.1 * (ratio("chosen") - ratio("rejected"))
    expected = {
        "rewards/chosen": 0.1 * ratio("chosen").mean(),
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "optimism/reward": 0.1 * ratio("explore").mean(),
        "loss": (np.log1p(np.exp(-margin)) + 0.2 * 0.1 * ratio("explore")).mean(),
        "grad_norm": norm / len(examples),
        "examples": len(examples),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_loss_that_reports_nothing_is_measured_all_the_same(world):
    """A user's loss that returns no metrics gets those of SELM's own, and what it reports wins."""

    def mine(logps):
        return jnp.square(logps.log_ratio("explore")), {
            "rewards/chosen": 7 + logps.policy["chosen"] * 0
        }

    objective = Objective(ROLES, mine, beta=0.1)
    update = make_update(world.decoder, objective, optimizer("adamw", **SETTINGS), chunk=16)
    examples, params = some_examples(), world.fresh()
    theirs, _ = world("selm")
    _, sums = totals(update, params, pack(examples, SHAPE), examples)
    _, of_selm = totals(theirs, params, pack(examples, SHAPE), examples)
    assert {key for key in of_selm if not key.startswith(("loss/", "optimism/"))} <= set(sums)
    for key in ("logps/chosen", "log_ratios/explore", "rewards/margins", "rewards/accuracies"):
        np.testing.assert_allclose(sums[key], of_selm[key], rtol=1e-6, err_msg=key)
    np.testing.assert_allclose(sums["rewards/chosen"], 7 * len(examples), rtol=1e-6)


def test_a_loss_may_name_its_metrics_as_it_likes():
    """Even `scored` and `load`, which are counts elsewhere; but not as the update's own counts."""
    sums = {"examples": 4.0, "loss": 8.0, "scored": 12.0, "load": 20.0}
    assert _means(sums) == {"examples": 4, "loss": 2, "scored": 3, "load": 5}
    (batch,) = pack(some_examples(4), SHAPE)
    logps = by_role(batch, batch.reference, batch.reference, np.ones(3, np.float32))
    mine = Objective(
        ROLES, lambda logps: (logps.policy["chosen"], {"_scored": logps.policy["chosen"]})
    )
    with pytest.raises(ObjectiveError, match="_scored begins with _"):
        mine(logps)


def test_copo_does_not_train_without_counts():
    """A user's loss that calls copo, but does not ask for counts, would be plain DPO."""
    (batch,) = pack(some_examples(4), SHAPE)
    logps = by_role(batch, batch.reference, batch.reference, np.ones(3, np.float32))
    with pytest.raises(ObjectiveError, match="pass bonus_bits"):
        Objective(ROLES, lambda logps: copo(0.1, 0.01)(logps))(logps)


# --- the reference -----------------------------------------------------------------------------


def test_a_live_reference_equals_a_stored_one(world):
    update, _ = world("selm")
    reference = world.fresh(seed=5)
    examples = scored(update, reference, some_examples())
    stored = totals(update, world.fresh(), pack(examples, SHAPE), examples)
    unscored = [dataclasses.replace(e, reference_logps=None) for e in examples]
    live = totals(update, world.fresh(), pack(unscored, SHAPE), examples, reference)
    assert_close(live, stored, atol=1e-5)


def test_no_gradient_reaches_a_live_reference(world):
    """Not even if the reference and the trained parameters are the same object."""
    update, _ = world("selm")
    params = world.fresh()
    examples = scored(update, params, some_examples())
    stored, _ = totals(update, params, pack(examples, SHAPE), examples)
    live, _ = totals(update, params, pack(examples, SHAPE), examples, params)
    assert_close(live, stored)
    assert optax.tree.norm(stored) > 1


@pytest.mark.parametrize("alone", [False, True])
def test_at_step_0_the_loss_is_log_2_whatever_alpha(world, alone):
    """Also if the stored reference was computed in different batches."""
    update, _ = world("selm")
    examples, params = some_examples(), world.fresh()
    groups = [[e] for e in examples] if alone else [examples]
    examples = [e for group in groups for e in scored(update, params, group)]
    _, sums = totals(update, params, pack(examples, SHAPE), examples)
    np.testing.assert_allclose(sums["loss"] / 16, math.log(2), rtol=1e-6)
    assert abs(float(sums["optimism/reward"])) < 1e-4


def test_training_learns_what_is_preferred(world):
    update, step = world("selm")
    examples = scored(update, world.fresh(), some_examples())
    state = TrainState.create(world.fresh(), step)
    history = []
    for _ in range(12):
        gradients, sums = totals(update, state.params, pack(examples, SHAPE), examples)
        state, metrics = update.apply(state, gradients, sums, np.float32(0.01))
        history.append({k: float(v) for k, v in metrics.items()})
    assert int(state.step) == 12
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert history[-1]["rewards/accuracies"] == 1


# --- buffers and compilations ------------------------------------------------------------------


def test_what_is_donated_is_gone_and_what_is_not_stays(world):
    update, step = world("selm")
    examples = some_examples()
    state = TrainState.create(world.fresh(), step)
    (batch,), (other,) = pack(examples[:9], SHAPE), pack(examples[9:], SHAPE)
    means = mean_lengths(examples)
    first, sums = update.gradients(state.params, batch, means)
    gradients, sums_too = update.add(first, sums, state.params, other, means)
    assert all(x.is_deleted() for x in jax.tree.leaves((first, sums)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    new, _ = update.apply(state, gradients, sums_too, np.float32(0.01))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


# --- optimisers and schedules ------------------------------------------------------------------


def steps_of(step, rates, params, gradients):
    state = step.init(params)
    for rate, g in zip(rates, gradients, strict=True):
        change, state = step.update(g, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda x, r=rate: r * x, change))
    return params


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unit_rate_optimisers_are_optaxs_own(name, decay):
    """Our rate is applied outside the optimiser; optax's, inside, gives the same steps."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(200, 150)), jnp.float32), "b": jnp.ones(5)}
    gradients = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        for _ in range(4)
    ]
    rates = [0.0, 0.05, 0.1, 0.02]

    def schedule(count):
        return jnp.array(rates)[count]

    theirs = {
        "adamw": lambda: optax.adamw(schedule, b1=0.8, b2=0.9, eps=1e-6, weight_decay=decay),
        "adafactor": lambda: optax.adafactor(schedule),
        "rmsprop": lambda: optax.rmsprop(schedule, decay=0.9, eps=1e-6),
    }[name]()
    if decay and name != "adamw":  # decoupled, as adamw's: rate * decay * parameter is taken off
        unit = {
            "adafactor": lambda: optax.adafactor(1.0),
            "rmsprop": lambda: optax.rmsprop(1.0, decay=0.9, eps=1e-6),
        }[name]()
        theirs = optax.chain(
            unit, optax.add_decayed_weights(-decay), optax.scale_by_schedule(schedule)
        )
    ours = optimizer(name, b1=0.8, b2=0.9, eps=1e-6, weight_decay=decay)
    got = steps_of(ours, rates, params, gradients)
    assert_close(got, steps_of(theirs, [1.0] * 4, params, gradients), atol=1e-6)
    assert jnp.abs(got["w"] - params["w"]).max() > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_descends(name, world):
    update, _ = world("selm")
    step = optimizer(name, **SETTINGS)
    apply = make_update(world.decoder, build_objective("sft"), step, chunk=16, clip=1.0).apply
    examples = some_examples()
    state = TrainState.create(world.fresh(), step)
    losses = []
    for _ in range(5):
        gradients, sums = totals(update, state.params, pack(examples, SHAPE), examples)
        state, metrics = apply(state, gradients, sums, np.float32(0.003))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_the_mean_gradient_is_clipped_by_its_global_norm(world):
    """With a plain step of gradient descent the change is the clipped gradient itself."""
    examples = some_examples()
    params = world.fresh()
    gradients, sums = totals(world("selm")[0], params, pack(examples, SHAPE), examples)
    mean = jax.tree.map(lambda g: g / len(examples), gradients)
    norm = float(optax.tree.norm(mean))
    for clip, factor in ((None, 1.0), (2 * norm, 1.0), (norm / 4, 0.25)):
        descent = optax.scale(-1.0)
        update = make_update(world.decoder, build_objective("sft"), descent, chunk=16, clip=clip)
        state = TrainState.create(world.fresh(), descent)
        state, metrics = update.apply(state, gradients, sums, np.float32(0.5))
        expected = jax.tree.map(lambda x, g, f=factor: x - 0.5 * f * g, world.fresh(), mean)
        assert_close(state.params, expected)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)  # before clipping


def test_a_gradient_of_zero_is_no_trouble(world):
    update, step = world("selm")
    state = TrainState.create(world.fresh(), step)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    sums = {"loss": jnp.zeros(()), "examples": jnp.ones(())}
    state, metrics = update.apply(state, zero, sums, np.float32(0.5))
    assert metrics["grad_norm"] == 0
    assert_close(state.params, world.fresh(), rtol=0, atol=0)


def test_an_unknown_optimiser_or_schedule():
    with pytest.raises(ValueError, match="'sgd'.*adamw"):
        optimizer("sgd", **SETTINGS)
    with pytest.raises(ValueError, match="'step'.*cosine"):
        learning_rate("step", 1.0, 10, 0.1)


@pytest.mark.parametrize(("updates", "warmup"), [(59, 6), (159, 16)])
def test_the_papers_schedules(updates, warmup):
    """6 and 16 warm-up updates, then a cosine to zero; the formula of the authors' library."""
    rate = learning_rate("cosine", 5e-7, updates, 0.1)
    for k in range(updates + 1):
        if k < warmup:
            expected = 5e-7 * k / warmup
        else:
            done = (k - warmup) / (updates - warmup)
            expected = 5e-7 * 0.5 * (1 + math.cos(math.pi * done))
        np.testing.assert_allclose(rate(k), expected, rtol=1e-5, atol=1e-14)
    assert rate(0) == 0 and rate(warmup) == np.float32(5e-7)
    assert 0 < rate(updates - 1) < 1e-9 and abs(rate(updates)) < 1e-14


def test_the_other_schedules():
    linear, constant = (learning_rate(name, 1.0, 10, 0.2) for name in ("linear", "constant"))
    np.testing.assert_allclose([linear(k) for k in range(11)], [0, 0.5, *np.linspace(1, 0, 9)])
    assert [float(constant(k)) for k in range(11)] == [0, 0.5] + [1] * 9
    assert float(learning_rate("cosine", 1.0, 10, 0.0)(0)) == 1
    assert float(learning_rate("cosine", 1.0, 1, 0.1)(0)) == 0  # one update, all warm-up


# --- the mesh ----------------------------------------------------------------------------------


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: (
        COMPILED.append(name) if name.endswith("backend_compile_duration") else 0
    )
)


SELM = build_objective("selm", beta=0.1, alpha=0.2)


def run_on(mesh, decoder, params, objective=SELM, updates=3, make=some_examples):
    """Updates of two microbatches of 8 rows each; nothing compiles after the first."""
    at = shardings(abstract_params(decoder.config), mesh, TRAINING)
    where = Shardings(at, NamedSharding(mesh, PartitionSpec()))

    def put(x):
        axes = ("rows", None, None, None)[: x.ndim]
        return jax.device_put(x, partition("batch", axes, x.shape, mesh, TRAINING))

    step = optimizer("adamw", **SETTINGS)
    update = make_update(decoder, objective, step, chunk=16, clip=1.0, shardings=where)
    params = jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), params, at)
    state = TrainState.create(params, step)
    start = jax.tree.map(lambda x: x.sharding, state)
    losses = []
    for k in range(updates):
        examples = make(36, seed=k)
        batches = [jax.tree.map(put, b) for b in pack(examples, SHAPE)]
        assert len(batches) == 2
        gradients, sums = totals(update, state.params, batches, examples)
        state, metrics = update.apply(state, gradients, sums, np.float32(0.003))
        losses.append(float(metrics["loss"]))
        if k == 0:
            logps = [np.asarray(update.logps(state.params, b)) for b in batches]
            compiled = len(COMPILED)
    assert len(COMPILED) == compiled > 0
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, start)
    assert all(jax.tree.leaves(same))
    return losses, logps, state


@pytest.fixture(scope="module")
def on_one_device(tiny, random_params):
    decoder = Decoder(tiny(), remat="full")
    params = random_params(decoder.config)
    return decoder, params, run_on(make_mesh((1, 1, 1), jax.devices()[:1]), decoder, params)


@pytest.mark.slow_except("sizes0", "sizes2-blocks")
@pytest.mark.parametrize(
    ("sizes", "back_end"), [((1, 8, 1), "auto"), ((2, 2, 2), "auto"), ((1, 4, 2), "blocks")]
)
def test_eight_devices_do_what_one_does(sizes, back_end, on_one_device):
    decoder, params, (losses, logps, state) = on_one_device
    mesh = make_mesh(sizes)
    cut = decoder.clone(mesh=mesh, back_end=back_end)
    found, found_logps, found_state = run_on(mesh, cut, params)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(found_logps, logps, rtol=1e-5, atol=1e-4)
    assert_close(found_state.params, state.params, rtol=0, atol=1e-6)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.slow
def test_ld_dpo_on_eight_devices_does_what_it_does_on_one(tiny, random_params):
    """It sums the tokens up to a length, where other losses sum those of whole responses."""

    def make(count, seed):
        return [
            dataclasses.replace(e, shared_logps=tuple(x / 2 for x in e.reference_logps))
            for e in some_examples(count, seed)
        ]

    decoder = Decoder(tiny(layers=1))
    params = random_params(decoder.config)
    objective = build_objective("ld_dpo", beta=0.1, ld_alpha=0.3)
    one, cut = make_mesh((1, 1, 1), jax.devices()[:1]), make_mesh((2, 4, 1))
    losses, _, state = run_on(one, decoder, params, objective, 1, make)
    found, _, found_state = run_on(cut, decoder.clone(mesh=cut), params, objective, 1, make)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_close(found_state.params, state.params, rtol=0, atol=1e-6)
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_where_their_parameters_lie(name, tiny, random_params):
    """On a mesh no device has more of the optimiser's state than its share."""
    mesh = make_mesh((1, 8, 1))
    config = tiny(embed=128, mlp=256)  # large enough for adafactor to factor
    at = shardings(abstract_params(config), mesh, TRAINING)
    params = jax.tree.map(jax.device_put, random_params(config), at)
    state = TrainState.create(params, optimizer(name, **SETTINGS))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {8}
    lying = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape in lying]
    assert moments
    assert all(x.sharding.is_equivalent_to(lying[x.shape], x.ndim) for x in moments)


# --- mixtures of experts -----------------------------------------------------------------------


def test_routers_are_trained_if_asked_for_and_loads_are_those_of_all_batches(tiny, random_params):
    """Weight decay, too, leaves a frozen router as it is."""
    decoder = Decoder(tiny(layers=1, mixture=Mixture(4, 2, True)))
    step = optimizer("adamw", **SETTINGS | {"weight_decay": 0.1})
    objective = build_objective("selm", beta=0.1, alpha=0.2)
    frozen, trained = (
        make_update(decoder, objective, step, chunk=16, train_router=train_router)
        for train_router in (False, True)
    )
    params, examples = random_params(decoder.config), some_examples()
    gradients, sums = totals(trained, params, pack(examples, SHAPE), examples)
    parts = [pack(part, SHAPE)[0] for part in (examples[:7], examples[7:])]
    _, in_parts = totals(trained, params, parts, examples)
    np.testing.assert_array_equal(sums["_loads"], in_parts["_loads"])
    norms = []
    for update, moves in ((frozen, False), (trained, True)):
        state = TrainState(0, jax.tree.map(jnp.copy, params), step.init(params))
        state, metrics = update.apply(state, gradients, sums, 1e-2)
        assert 1 <= metrics["experts/load_max"] <= 4 and 0 <= metrics["experts/unused"] < 1
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, state.params)["layers"]
        assert moved["experts"] == {"gate": True, "up": True, "down": True, "router": moves}
        norms.append(float(metrics["grad_norm"]) * len(examples))
    of_router = optax.tree.norm(gradients["layers"]["experts"]["router"])
    assert norms[1] ** 2 - norms[0] ** 2 == pytest.approx(float(of_router) ** 2, rel=1e-3)
