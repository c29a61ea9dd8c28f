"""Computes measures on held-out prompts: reward, and KL divergence from the start model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from selm_jax.preferences.examples import Example
from selm_jax.statistics.intervals import Estimate, difference, pooled
from selm_jax.statistics.lengths import described, slope_metrics
from selm_jax.statistics.proportions import counted
from selm_jax.tables import heldout, heldout_pairs
from selm_jax.text.variety import distinct

SHARES = frozenset({"accuracy", "cut_off"})  # measures below that are shares of prompts

Values = Float[np.ndarray, " prompts"]


def measures(answers: Sequence[heldout.Row], scored: bool | None = None) -> dict[str, Values]:
    """Computes one number per prompt for each measure, in the order of the prompts.

    A prompt's samples are averaged, since they do not count as separate prompts.

    Args:
      scored: whether a ranker scored the answers; None: if any answer has a score.

    Returns:
      By name:
      reward_greedy, reward_sample: the ranker's scores, if there are any; NaN for a prompt if a
        judge's verdict on one of its answers could not be read.
      length, cut_off: tokens of the greedy answer, and whether it was cut off at its limit.
      kl: log pi(y) - log pi_start(y), in nats, of answers y sampled from pi at temperature 1. It
        includes only sampled tokens, never padding.
      entropy: -log pi(y) of the same answers; its mean estimates the entropy of pi's answers.
        Both are NaN for a prompt if one of its samples has no log-probability: leaving out only its
        longest answers would bias the mean.
    """
    greedy, sampled = _of_kind(answers, "greedy"), _of_kind(answers, "sample")
    out: dict[str, Values] = {}
    if scored is None:
        scored = not all(math.isnan(answer.score) for answer in answers)
    if greedy:
        if scored:
            out["reward_greedy"] = _column(greedy, "score")
        out["length"] = np.array([len(x.token_ids) for x in greedy], np.float64)
        out["cut_off"] = np.array([x.finish == "length" for x in greedy], np.float64)
    if sampled:
        prompts = len({answer.prompt_id for answer in sampled})
        logp, before = _column(sampled, "logp"), _column(sampled, "logp_start")
        each = {"kl": logp - before, "entropy": -logp}
        if scored:
            each["reward_sample"] = _column(sampled, "score")
        for name, values in each.items():
            out[name] = values.reshape(prompts, -1).mean(axis=1)
    return out


def pair_measures(pairs: Sequence[heldout_pairs.Row], beta: float) -> dict[str, Values]:
    """Computes one number per held-out pair for each measure.

    Returns:
      `margins`: the implicit reward (beta times the log-ratio) of the chosen answer minus that of
      the rejected one; `accuracy`: 1 if the margin is above 0, 1/2 if it is 0, else 0.
    """
    ratio = beta * (_column(pairs, "logp") - _column(pairs, "logp_start"))
    chosen = np.array([x.role == "chosen" for x in pairs])
    margins = ratio[chosen] - ratio[~chosen]
    return {"margins": margins, "accuracy": (1 + np.sign(margins)) / 2}


def shares(tables: Sequence[Sequence[heldout.Row]]) -> frozenset[str]:
    """The names of the measures that are shares of prompts, with values from 0 to 1.

    Rewards are shares if all scores are 0, 1/2 or 1 (`counted`).
    """

    def of_kind(kind: str) -> bool:
        return counted(answer.score for table in tables for answer in _of_kind(table, kind))

    return SHARES | {f"reward_{kind}" for kind in ("greedy", "sample") if of_kind(kind)}


def summarize(
    answers: Sequence[heldout.Row],
    start: Sequence[heldout.Row] | None,
    pairs: Sequence[heldout_pairs.Row] | None = None,
    beta: float = 1.0,
    capability: Values | None = None,
) -> dict[str, float | None]:
    """The held-out metrics of one iteration: means of `measures` and of `pair_measures`.

    Args:
      answers: held-out answers of the iteration's policy.
      start: the start model's answers to the same prompts; None if `answers` are the start model's.
      pairs: the data's held-out pairs.
      capability: the guard's measure of each text (`guard`).

    Returns:
      Metrics by name. Rewards are the ranker's scores, if there are any. If some of a judge's
      verdicts cannot be read, rewards and `gain` are over the other prompts (None if there are
      none), and `unread` counts the answers without a score. `gain` is the mean difference of
      greedy reward to the start model, paired by prompt. `entropy` is in nats per answer,
      `entropy_token` in nats per token; these and `kl` are over answers that have
      log-probabilities, and absent if there are none. `length` and `length_sample` have quantiles
      (`..._p10`, `..._p50`, `..._p90`), and `length_slope` is explained at `lengths.slope`.
      `distinct_1` and `distinct_2` are computed from the words of the greedy answers. `..._low`
      and `..._high` bound 95 % intervals over prompts (see `intervals`), if there are any;
      `kl_stderr` is the standard error of KL.
    """
    found = measures(answers)
    of_shares = shares([answers])
    greedy, sampled = _of_kind(answers, "greedy"), _of_kind(answers, "sample")
    out: dict[str, float | None] = {"heldout/prompts": len(greedy)}
    if 0 < (unread := sum(math.isnan(answer.score) for answer in answers)) < len(answers):
        out["heldout/unread"] = unread
    if "reward_greedy" in found:
        greedy_reward = pooled(found["reward_greedy"][None], share="reward_greedy" in of_shares)
        out |= as_metrics("heldout/reward_greedy", greedy_reward)
    texts = [answer.text for answer in greedy]
    for n in (1, 2):
        out[f"heldout/distinct_{n}"] = distinct(texts, n)
    out |= _lengths(answers)
    for name in ("cut_off", "entropy"):
        if name in found and (known := found[name][np.isfinite(found[name])]).size:
            out[f"heldout/{name}"] = float(known.mean())
    if sampled:
        if "reward_sample" in found:
            sampled_reward = pooled(
                found["reward_sample"][None], share="reward_sample" in of_shares
            )
            out |= as_metrics("heldout/reward_sample", sampled_reward)
        logps = _column(sampled, "logp")
        tokens = np.array([len(answer.token_ids) for answer in sampled])
        if (there := np.isfinite(logps)).any():
            out["heldout/entropy_token"] = -float(logps[there].sum()) / int(tokens[there].sum())
        if (kl := pooled(found["kl"][None])) is not None:
            out |= as_metrics("heldout/kl", kl)
            if kl.stderr is not None:
                out["heldout/kl_stderr"] = kl.stderr
    if start is not None:
        before = _of_kind(start, "greedy")
        if [answer.prompt_id for answer in before] != [answer.prompt_id for answer in greedy]:
            raise ValueError("the policy and the start model answered different prompts")
        if "reward_greedy" in found:
            share = "reward_greedy" in shares([answers, start])
            scores = found["reward_greedy"][None], _column(before, "score")[None]
            out |= as_metrics("heldout/gain", difference(*scores, share=share))
    if pairs is not None:
        for name, values in pair_measures(pairs, beta).items():
            estimate = pooled(values[None], share=name in SHARES)
            out |= as_metrics(f"heldout/pairs/{name}", estimate)
    if capability is not None and capability.size:
        out |= as_metrics("heldout/capability", pooled(capability[None]))
    return out


def _lengths(answers: Sequence[heldout.Row]) -> dict[str, float]:
    """The lengths of greedy and of sampled answers, and the slope of the reward over length."""
    out: dict[str, float] = {}
    for name, kind in (("heldout/length", "greedy"), ("heldout/length_sample", "sample")):
        out |= described(name, [len(answer.token_ids) for answer in _of_kind(answers, kind)])
    columns = zip(*((a.prompt_id, len(a.token_ids), a.score) for a in answers), strict=True)
    return out | slope_metrics("heldout/length_slope", *columns) if answers else out


def as_metrics(name: str, e: Estimate | None) -> dict[str, float | None]:
    """Converts an estimate to metrics: `NAME` (None if missing), `NAME_low` and `NAME_high`."""
    if e is None:
        return {name: None}
    ends = {f"{name}_low": e.low, f"{name}_high": e.high}
    return {name: e.mean, **{key: end for key, end in ends.items() if end is not None}}


def _of_kind(answers: Sequence[heldout.Row], kind: str) -> list[heldout.Row]:
    return [answer for answer in answers if answer.kind == kind]


def _column(rows: Sequence[heldout.Row | heldout_pairs.Row], name: str) -> Float[np.ndarray, " n"]:
    return np.array([getattr(row, name) for row in rows], np.float64)


def pair_rows(
    pairs: Sequence[Example],
    policy: Sequence[tuple[float, ...]],
    start: Sequence[tuple[float, ...]],
) -> list[heldout_pairs.Row]:
    """Makes table rows of pairs' log-probabilities under the policy and the start model."""
    return [
        heldout_pairs.Row(e.prompt_id, role, logp=p[at], logp_start=s[at])
        for e, p, s in zip(pairs, policy, start, strict=True)
        for role, at in e.roles.items()
    ]
