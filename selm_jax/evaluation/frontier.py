"""Held-out reward against divergence from the start: what exploration bought, and at what price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from selm_jax.preferences.examples import Example
from selm_jax.statistics.intervals import Estimate, difference, pooled
from selm_jax.statistics.proportions import counted
from selm_jax.text.variety import distinct

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("kind", pa.string()),  # "greedy" or "sample"
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish", pa.string()),  # "stop" or "length"
        # Of the ranker, see `stages.evaluate`; null if it is people, or a judge that said nothing
        # readable of this answer.
        ("score", pa.float64()),
        # Of the answer under the policy that gave it; null if it and its prompt are too long for a row.
        ("logp", pa.float32()),
        ("logp_start", pa.float32()),  # and under the start model
    ]
)

PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("role", pa.string()),  # "chosen" or "rejected"
        ("logp", pa.float32()),  # of the data's answer under the policy
        ("logp_start", pa.float32()),
    ]
)

SHARES = frozenset({"accuracy", "cut_off"})  # of prompts, among the measures below

Values = Float[np.ndarray, " prompts"]


def measures(answers: pa.Table, scored: bool | None = None) -> dict[str, Values]:
    """One number per prompt of each measure, in the order of the prompts.

    `scored` says whether a ranker was asked; None: if there is any score. A prompt's samples are averaged: they are answers to one prompt, and no more prompts. Names:
      reward_greedy, reward_sample: the ranker's scores, if there are any. NaN for a prompt of one of
        whose answers a judge said nothing readable.
      length, cut_off: tokens of the greedy answer, and whether it was cut at its limit.
      kl: log pi(y) - log pi_start(y), in nats, of answers y drawn from pi at temperature 1. It is
        about the tokens that were drawn, so never about padding.
      entropy: -log pi(y) of the same answers: its mean estimates the entropy of pi's answers.
        Both are NaN for a prompt of whose samples one has no log-probability: to leave out its
        longest answers alone would bend its mean.
    """
    greedy, sampled = _of_kind(answers, "greedy"), _of_kind(answers, "sample")
    out: dict[str, Values] = {}
    if scored is None:
        scored = answers["score"].null_count < answers.num_rows
    if greedy.num_rows:
        if scored:
            out["reward_greedy"] = _column(greedy, "score")
        out["length"] = np.array([len(x) for x in greedy["token_ids"].to_pylist()], np.float64)
        out["cut_off"] = np.array([x == "length" for x in greedy["finish"].to_pylist()], np.float64)
    if sampled.num_rows:
        prompts = len(set(sampled["prompt_id"].to_pylist()))
        logp, before = _column(sampled, "logp"), _column(sampled, "logp_start")
        each = {"kl": logp - before, "entropy": -logp}
        if scored:
            each["reward_sample"] = _column(sampled, "score")
        for name, values in each.items():
            out[name] = values.reshape(prompts, -1).mean(axis=1)
    return out


def pair_measures(pairs: pa.Table, beta: float) -> dict[str, Values]:
    """The same of held-out pairs: `margins` of implicit rewards, beta times the log-ratios, chosen
    minus rejected; and `accuracy`, whether the margin is above 0 (a margin of 0 counts half)."""
    ratio = beta * (_column(pairs, "logp") - _column(pairs, "logp_start"))
    chosen = np.array([x == "chosen" for x in pairs["role"].to_pylist()])
    margins = ratio[chosen] - ratio[~chosen]
    return {"margins": margins, "accuracy": (1 + np.sign(margins)) / 2}


def shares(tables: Sequence[pa.Table]) -> frozenset[str]:
    """Which measures of these tables of answers are shares of prompts.

    Rewards of greedy or of sampled answers are, where each of their scores says right, half right or
    wrong (`counted`).
    """
    kinds = ("greedy", "sample")
    scores = {kind: [_of_kind(t, kind)["score"].to_pylist() for t in tables] for kind in kinds}
    return SHARES | {f"reward_{k}" for k in kinds if all(map(counted, scores[k]))}


def summarize(
    answers: pa.Table,
    start: pa.Table | None,
    pairs: pa.Table | None = None,
    beta: float = 1.0,
) -> dict[str, float | None]:
    """The held-out metrics of one iteration: means of `measures` and of `pair_measures`.

    Args:
      answers: held-out answers of the iteration's policy, by `SCHEMA`.
      start: those of the start model to the same prompts; None if these are they.
      pairs: the data's held-out pairs, by `PAIRS`.

    Returns:
      Rewards are the ranker's scores; without scores there are none. Where a judge was not readable
      they, and `gain`, are over the other prompts, and None if there is no other; `unread` counts the
      answers that have no score for it. `..._low` and `..._high` bound 95 % intervals about other
      prompts (see `intervals`), where there are any; `kl_stderr` is KL's standard error. `gain` is the
      mean difference of greedy reward to the start, paired by prompt. `entropy` is in nats per
      answer, `entropy_token` per token. These and `kl` are over what has log-probabilities, and are
      not there if nothing has. `distinct_1` and `distinct_2` are of the greedy answers'
      words.
    """
    found = measures(answers)
    of_shares = shares([answers])
    greedy, sampled = _of_kind(answers, "greedy"), _of_kind(answers, "sample")
    out: dict[str, float | None] = {"heldout/prompts": greedy.num_rows}
    if 0 < (unread := answers["score"].null_count) < answers.num_rows:
        out["heldout/unread"] = unread
    if "reward_greedy" in found:
        greedy_reward = pooled(found["reward_greedy"][None], share="reward_greedy" in of_shares)
        out |= _interval("heldout/reward_greedy", greedy_reward)
    texts = greedy["text"].to_pylist()
    for n in (1, 2):
        out[f"heldout/distinct_{n}"] = distinct(texts, n)
    for name in ("length", "cut_off", "entropy"):
        if name in found and (known := found[name][np.isfinite(found[name])]).size:
            out[f"heldout/{name}"] = float(known.mean())
    if sampled.num_rows:
        if "reward_sample" in found:
            sampled_reward = pooled(
                found["reward_sample"][None], share="reward_sample" in of_shares
            )
            out |= _interval("heldout/reward_sample", sampled_reward)
        logps = _column(sampled, "logp")
        tokens = np.array([len(x) for x in sampled["token_ids"].to_pylist()])
        if (there := np.isfinite(logps)).any():
            out["heldout/entropy_token"] = -float(logps[there].sum()) / int(tokens[there].sum())
        if (kl := pooled(found["kl"][None])) is not None:
            out |= _interval("heldout/kl", kl)
            if kl.stderr is not None:
                out["heldout/kl_stderr"] = kl.stderr
    if start is not None:
        before = _of_kind(start, "greedy")
        if before["prompt_id"].to_pylist() != greedy["prompt_id"].to_pylist():
            raise ValueError("held-out answers of two iterations are to different prompts")
        if "reward_greedy" in found:
            share = "reward_greedy" in shares([answers, start])
            scores = found["reward_greedy"][None], _column(before, "score")[None]
            out |= _interval("heldout/gain", difference(*scores, share=share))
    if pairs is not None:
        for name, values in pair_measures(pairs, beta).items():
            estimate = pooled(values[None], share=name in SHARES)
            out |= _interval(f"heldout/pairs/{name}", estimate)
    return out


def _interval(name: str, e: Estimate | None) -> dict[str, float | None]:
    """The mean under `name`, and the ends of its interval if it has one; None of no prompt at all."""
    if e is None:
        return {name: None}
    ends = {f"{name}_low": e.low, f"{name}_high": e.high}
    return {name: e.mean, **{key: end for key, end in ends.items() if end is not None}}


def _of_kind(answers: pa.Table, kind: str) -> pa.Table:
    return answers.filter(pa.compute.equal(answers["kind"], kind))


def _column(answers: pa.Table, name: str) -> Float[np.ndarray, " n"]:
    return np.asarray(answers[name].to_pylist(), np.float64)


def table(rows: Sequence[dict]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def pair_table(
    pairs: Sequence[Example],
    policy: Sequence[tuple[float, ...]],
    start: Sequence[tuple[float, ...]],
) -> pa.Table:
    """By `PAIRS`, from the log-probabilities of each pair's responses."""
    rows = [
        {"prompt_id": e.prompt_id, "role": role, "logp": p[at], "logp_start": s[at]}
        for e, p, s in zip(pairs, policy, start, strict=True)
        for role, at in e.roles.items()
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS)
