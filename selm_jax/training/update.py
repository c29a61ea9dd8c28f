"""The jitted training update, which computes new parameters from packed batches.

    grads, sums = gradients(params, first)                  summed over examples, not averaged
    for microbatch in rest:                                 any number of them
        grads, sums = add(grads, sums, params, microbatch)
    state, metrics = apply(state, grads, sums, learning_rate)

The loss of an example is a function of its responses' log-ratios (`objectives.losses`). The update
averages over its `global_batch` examples exactly, whatever the packing, the number of microbatches
or the mesh: sums and counts travel, and means are taken once.

Every function is compiled by `jax.jit` with explicit shardings and donated buffers; XLA partitions
it over the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding
from jaxtyping import Array, Float

from selm_jax.models.decoder import LAYER_SCALE, Decoder, Params, unembedding
from selm_jax.models.experts import LOAD, ROUTER, expert_counts, load_metrics
from selm_jax.objectives.logprobs import TokenStats, token_logprobs, token_statistics
from selm_jax.objectives.losses import Logps, Metrics, Objective, ObjectiveError, Rewards
from selm_jax.objectives.measures import measures
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.packing import PreferenceBatch
from selm_jax.preferences.rewards import response_rewards, rewards_of
from selm_jax.training.state import TrainState

PerExample = Float[Array, " segments"]
Sums = dict[str, Array]  # scalars, and for a mixture of experts the counts of `expert_counts`

# Counts among the sums. `Objective` refuses metrics of a loss that begin with "_".
_SCORED, _LOADS = "_scored", "_loads"


def response_logps(
    decoder: Decoder, params: Params, batch: PreferenceBatch, chunk: int
) -> Float[Array, "rows segments branches"]:
    """log pi(response | prompt) of every response in the batch; 0 where there is no response."""
    return batch.sum_by_response(scored_logps(decoder, params, batch, chunk))


def scored_logps(
    decoder: Decoder, params: Params, batch: PreferenceBatch, chunk: int
) -> Float[Array, "rows scored"]:
    """log pi(token | context) of every scored token in the batch; see `response_logps`."""
    return of_scored(token_logprobs, decoder, params, batch, chunk)[0]


def of_scored(
    head: Callable[..., Any],
    decoder: Decoder,
    params: Params,
    batch: PreferenceBatch,
    chunk: int,
    adapters: Params | None = None,
    key: Array | None = None,
) -> tuple[Any, Sums]:
    """Applies `head`, such as `token_statistics`, to every scored token in the batch.

    Args:
      adapters: variables of the decoder's `lora`; None for a decoder without adapters.
      key: seeds the dropout of the adapters; None means no dropout.

    Returns:
      what `head` returns, and, if the model has experts, how many tokens each expert computes.
    """
    variables = {"params": params} | ({} if adapters is None else {"lora": adapters})
    hidden, load = _hidden(decoder, variables, batch, None if key is None else {"dropout": key})
    predicting = jnp.take_along_axis(hidden, batch.predictor[..., None], axis=1)
    found = head(
        predicting, batch.target, unembedding(params), chunk, decoder.config.logit_cap,
        mesh=decoder.mesh, frozen=adapters is not None,
    )  # fmt: skip
    return found, load


def _hidden(
    decoder: Decoder, variables: Any, batch: PreferenceBatch, rngs: Any = None
) -> tuple[Float[Array, "rows time embed"], Sums]:
    """The hidden states, and, if the model has experts, how many tokens each expert computes."""
    rows = batch.tokens, batch.position, batch.end
    (hidden, _), left = cast(Any, decoder.apply(variables, *rows, rngs=rngs, mutable=[LOAD]))
    if decoder.config.mixture is None:
        return hidden, {}
    chosen = left[LOAD]["layers"]["experts"]["chosen"]
    return hidden, {_LOADS: expert_counts(chosen, batch.segment > 0, decoder.config.mixture)}


def by_role(
    batch: PreferenceBatch,
    policy: Float[Array, "rows segments branches"],
    reference: Float[Array, "rows segments branches"],
    mean_lengths: Float[Array, " roles"],
    collision: Float[Array, "rows segments branches"] | None = None,
    shared: tuple[Array, Array] | None = None,
) -> Logps:
    """The log-probabilities of each role's response: one number per segment of each row.

    If several responses explore, the role `explore` has their mean. `collision` and `shared`, like
    `policy` and `reference` but of shared lengths, are for objectives that use them.
    """
    lengths = batch.sum_by_response(jnp.ones(batch.target.shape, jnp.float32))
    return Logps(
        policy=_of_roles(batch, policy),
        reference=_of_roles(batch, reference),
        lengths=_of_roles(batch, lengths),
        mean_lengths=dict(zip(ROLES, mean_lengths, strict=True)),
        scores=_of_roles(batch, batch.scores),
        bonus=None if batch.bonus is None else batch.bonus.reshape(-1),
        collision={} if collision is None else _of_roles(batch, collision),
        shared_policy={} if shared is None else _of_roles(batch, shared[0]),
        shared_reference={} if shared is None else _of_roles(batch, shared[1]),
    )


def _of_roles(
    batch: PreferenceBatch, per_response: Float[Array, "rows segments branches"]
) -> dict[str, Float[Array, " segments"]]:
    # A weight of 1 and zeros picks exactly: sums of x and zeros are x, in any order.
    picked = jnp.sum(batch.roles * per_response[:, :, None, :], axis=-1)
    return {role: picked[..., i].reshape(-1) for i, role in enumerate(ROLES)}


def loss_sums(
    params: Params,
    batch: PreferenceBatch,
    mean_lengths: Float[Array, " roles"],
    *,
    decoder: Decoder,
    objective: Objective,
    chunk: int,
    statistics: bool = False,
    reference_params: Params | None = None,
    base: Params | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """The sum of the loss over the batch's examples, and the sums of the metrics.

    If the objective `rates`, `params` are a reward model's, and the reference is not used. With
    `reference_params` the reference's log-probabilities are computed live by the same function;
    otherwise the stored ones are used. Both give the same numbers. With `base`, `params` are the
    adapters of the decoder's `lora`, and the base stays as it is. With `statistics`, the sums have
    those of `PER_TOKEN` as well.
    """
    if (base is None) != (decoder.lora is None):
        raise ValueError("pass `base` for a decoder with adapters, and only for such a decoder")
    plain = decoder.clone(lora=None)
    if objective.rates:
        hidden, load = _hidden(decoder, {"params": params}, batch)
        rewards = _of_roles(batch, rewards_of(params, hidden, batch))
        given = Rewards(rewards, _of_roles(batch, batch.scores))
        loss, sums = _sums(batch, *_measured(objective, given))
        return loss, sums | load
    detailed = statistics or objective.uses_collision
    head = token_statistics if detailed else token_logprobs
    if base is None:
        found, load = of_scored(head, plain, params, batch, chunk)
    else:
        found, load = of_scored(head, decoder, base, batch, chunk, params, key)
    of_tokens = found.logprob if detailed else found
    if batch.importance is not None:
        of_tokens = with_gradients_times(batch.importance, of_tokens)
    policy, reference = batch.sum_by_response(of_tokens), batch.reference
    shared, of_reference = None, None
    if reference_params is not None:
        of_reference = scored_logps(plain, reference_params, batch, chunk)
        reference = batch.sum_by_response(of_reference)
    if objective.uses_shared:
        shared = shared_logps(batch, of_tokens, of_reference)
    collision = batch.sum_by_response(found.collision) if objective.uses_collision else None
    reference = jax.lax.stop_gradient(reference)
    logps = by_role(batch, policy, reference, mean_lengths, collision, shared)
    loss, sums = _sums(batch, *_measured(objective, logps))
    return loss, sums | load | (_token_sums(batch, found) if statistics else {})


def shared_logps(
    batch: PreferenceBatch, policy: Array, reference: Array | None
) -> tuple[Array, Array]:
    """The log-probabilities of responses within the length of their pair's shorter one.

    Args:
      policy, reference: of the scored tokens; without those of a live reference, the stored sums
        are used.

    Returns:
      Those of the policy and of the reference, [rows, segments, branches].

    Raises:
      ObjectiveError: there is neither a live reference nor a stored sum.
    """
    within = batch.shared()
    policy, *live = (
        batch.sum_by_response(jnp.where(within, of_tokens, 0))
        for of_tokens in (policy, reference)
        if of_tokens is not None
    )
    stored = live[0] if live else batch.shared_reference
    if stored is None:
        raise ObjectiveError(
            "the loss weighs the tokens beyond the shorter answer, but these examples lack the "
            "reference's log-probabilities of the shared length. Score them again"
        )
    return policy, jax.lax.stop_gradient(stored)


def with_gradients_times(weights: Array, values: Array) -> Array:
    """Returns the values unchanged, but multiplies their gradients by the weights."""
    fixed = jax.lax.stop_gradient(values)
    return fixed + weights * (values - fixed)


def _measured(objective: Objective, given: Logps | Rewards) -> tuple[PerExample, Metrics]:
    """Returns (losses, metrics); an objective's own metrics replace the general ones."""
    losses, metrics = objective(given)
    return losses, measures(given, objective) | metrics


def _sums(
    batch: PreferenceBatch, losses: PerExample, metrics: Metrics
) -> tuple[Float[Array, ""], Sums]:
    """Sums losses and metrics over the batch's examples; empty segments have weight 0."""
    weight = batch.weight.reshape(-1)
    sums = {name: jnp.sum(weight * value) for name, value in metrics.items()}
    loss = jnp.sum(weight * losses)
    return loss, sums | {"loss": loss, "examples": jnp.sum(weight)}


# Metrics that are means over scored tokens, not over examples. TRL has them by these names.
PER_TOKEN = ("entropy", "mean_token_accuracy")


def _token_sums(batch: PreferenceBatch, found: TokenStats) -> Sums:
    """Sums over the batch's scored tokens, and their number."""
    real = batch.owner < batch.reference[0].size
    values = (found.entropy, found.likeliest)
    sums = {k: jnp.sum(jnp.where(real, v, 0.0)) for k, v in zip(PER_TOKEN, values, strict=True)}
    return sums | {_SCORED: jnp.sum(real, dtype=jnp.float32)}


def _means(sums: Sums) -> Sums:
    """The update's metrics: means over examples or over scored tokens, and the examples' number."""
    count = sums["examples"]
    scored = sums.get(_SCORED, count)
    counts = ("examples", _SCORED, _LOADS)
    of = {k: scored if k in PER_TOKEN else count for k in sums if k not in counts}
    load = load_metrics(sums[_LOADS]) if _LOADS in sums else {}
    return {k: sums[k] / n for k, n in of.items()} | load | {"examples": count}


def _held(tree: Any, names: Collection[str]) -> Any:
    """The tree of gradients or steps, with zeros for parameters of these names."""

    def of(path, x):
        return jnp.zeros_like(x) if path[-1].key in names else x

    return jax.tree_util.tree_map_with_path(of, tree)


class Update(NamedTuple):
    """The compiled functions that train a model. Arguments marked * below are donated.

    gradients(params, batch, mean_lengths[, reference, base, key]) -> (gradients, sums)
    add(gradients*, sums*, params, batch, mean_lengths[, reference, base, key]) -> (gradients, sums)
    apply(state*, gradients, sums, learning_rate) -> (state, metrics)
    logps(params, batch) -> response log-probabilities [rows, segments, branches], no adapters
    logps_by_token(params, batch) -> (the same, the log-probability of each token [rows, scored])
    rewards(params, batch) -> a reward model's rewards [rows, segments, branches]

    `params` and `state.params` are the trained parameters: all, or the adapters on `base`.
    """

    gradients: Callable[..., tuple[Params, Sums]]
    add: Callable[..., tuple[Params, Sums]]
    apply: Callable[..., tuple[TrainState, Sums]]
    logps: Callable[..., Float[Array, "rows segments branches"]]
    logps_by_token: Callable[..., tuple[Array, Array]]
    rewards: Callable[..., Float[Array, "rows segments branches"]]


def _if_fine(fine: Array, done: TrainState, before: TrainState) -> TrainState:
    """The state after an update if it is `fine`; else the one before it, at the next step."""
    kept = TrainState(done.step, before.params, before.opt_state)
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), done, kept)


class Shardings(NamedTuple):
    """The shardings of parameters and of replicated results; None everywhere means one device."""

    params: Any = None
    replicated: Sharding | None = None


def make_update(
    decoder: Decoder,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    chunk: int,
    clip: float | None = None,
    statistics: bool = False,
    skip: bool = False,
    train_router: bool = True,
    shardings: Shardings = Shardings(),  # noqa: B008 (a NamedTuple, immutable)
) -> Update:
    """Makes the compiled functions of a run; each compiles at its first call with a shape.

    `optimizer` gives steps for a learning rate of 1 (see `training.optimizer`). The learning rate
    is an argument of `apply`, so that iterations with different schedules share one compilation.
    `clip` bounds the global norm of the mean gradient; None does not. With `statistics`, there are
    the metrics `PER_TOKEN`. With `skip`, an update whose loss or gradient is not finite leaves
    parameters and moments as they are, and the metric `skipped` is 1. Without `train_router`, the
    routers of a mixture of experts stay as they are. The scales of layers always do.
    """
    trained = partial(_held, names={LAYER_SCALE} if train_router else {LAYER_SCALE, *ROUTER})

    def gradients(params, batch, mean_lengths, reference=None, base=None, key=None):
        loss = jax.value_and_grad(
            lambda p: loss_sums(
                p, batch, mean_lengths, decoder=decoder, objective=objective, chunk=chunk,
                statistics=statistics, reference_params=reference, base=base, key=key,
            ), has_aux=True,
        )  # fmt: skip
        (_, sums), grads = loss(params)
        return grads, sums

    def add(grads, sums, params, batch, mean_lengths, reference=None, base=None, key=None):
        more, more_sums = gradients(params, batch, mean_lengths, reference, base, key)
        return jax.tree.map(jnp.add, grads, more), jax.tree.map(jnp.add, sums, more_sums)

    def apply(state, grads, sums, learning_rate):
        count, grads = sums["examples"], trained(grads)
        norm = optax.tree.norm(grads) / count
        # Mean and clipping are one factor here, not a part of optax's chain: that would keep a
        # second tree of gradients in memory until the norm is known.
        factor = (1.0 if clip is None else jnp.minimum(1.0, clip / norm)) / count
        grads = jax.tree.map(lambda g: factor * g, grads)
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # Again, because weight decay would move what is not trained.
        steps = jax.tree.map(lambda step: learning_rate * step, trained(steps))
        params = cast(Params, optax.apply_updates(state.params, steps))
        metrics = _means(sums) | {"grad_norm": norm}
        done = TrainState(state.step + 1, params, opt_state)
        if skip:
            fine = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
            done, metrics = _if_fine(fine, done, state), metrics | {"skipped": 1.0 - fine}
        return done, metrics

    plain = decoder.clone(lora=None)

    def logps_by_token(params, batch):
        of_tokens = scored_logps(plain, params, batch, chunk)
        return batch.sum_by_response(of_tokens), of_tokens

    s = shardings
    return Update(
        gradients=jax.jit(gradients, out_shardings=(s.params, s.replicated)),
        add=jax.jit(add, out_shardings=(s.params, s.replicated), donate_argnums=(0, 1)),
        apply=jax.jit(
            apply,
            out_shardings=(cast(Any, TrainState)(s.replicated, s.params, None), s.replicated),
            donate_argnums=0,
        ),
        logps=jax.jit(
            lambda params, batch: response_logps(plain, params, batch, chunk),
            out_shardings=s.replicated,
        ),
        logps_by_token=jax.jit(logps_by_token, out_shardings=s.replicated),
        rewards=jax.jit(
            lambda params, batch: response_rewards(decoder, params, batch),
            out_shardings=s.replicated,
        ),
    )
