"""Held-out reward against divergence from the start: what exploration bought, and at what price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy import stats

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("kind", pa.string()),  # "greedy" or "sample"
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish", pa.string()),  # "stop" or "length"
        ("score", pa.float64()),  # of the ranker, see `stages.evaluate`; null if it is people
        ("logp", pa.float32()),  # of the answer under the policy that gave it
        ("logp_start", pa.float32()),  # and under the start model
    ]
)

_RESAMPLES = 9999


def summarize(answers: pa.Table, start: pa.Table | None) -> dict[str, float]:
    """The held-out metrics of one iteration.

    Args:
      answers: held-out answers of the iteration's policy, by `SCHEMA`.
      start: those of the start model to the same prompts; None if these are they.

    Returns:
      Rewards are the ranker's scores. `..._low` and `..._high` bound 95 % bootstrap intervals over
      prompts; without scores there are none. `heldout/gain` is the mean difference of greedy reward to the start, paired by
      prompt. `heldout/kl` estimates KL(policy || start) per answer in nats: the mean of
      log pi(y) - log pi_start(y) over answers y drawn from the policy at temperature 1, with its
      standard error; it is about the tokens that were drawn, so never about padding.
    """
    greedy = _of_kind(answers, "greedy")
    sampled = _of_kind(answers, "sample")
    out: dict[str, float] = {"heldout/prompts": greedy.num_rows}
    scored = answers["score"].null_count == 0
    if scored:
        out |= interval("heldout/reward_greedy", _column(greedy, "score"))
    out["heldout/length"] = float(np.mean([len(x) for x in greedy["token_ids"].to_pylist()]))
    out["heldout/cut_off"] = float(np.mean([x == "length" for x in greedy["finish"].to_pylist()]))
    if sampled.num_rows:
        if scored:
            out |= interval("heldout/reward_sample", _column(sampled, "score"))
        ratio = _column(sampled, "logp") - _column(sampled, "logp_start")
        out["heldout/kl"] = float(ratio.mean())
        if len(ratio) > 1:
            out["heldout/kl_stderr"] = float(ratio.std(ddof=1) / np.sqrt(len(ratio)))
    if start is not None:
        before = _of_kind(start, "greedy")
        if before["prompt_id"].to_pylist() != greedy["prompt_id"].to_pylist():
            raise ValueError("held-out answers of two iterations are to different prompts")
        if scored:
            out |= interval("heldout/gain", _column(greedy, "score") - _column(before, "score"))
    return out


def interval(name: str, values: Float[np.ndarray, " n"]) -> dict[str, float]:
    """The mean under `name`, and the ends of its 95 % percentile bootstrap interval."""
    mean = float(values.mean())
    low = high = mean
    if len(values) > 1 and values.std() > 0:
        found = stats.bootstrap(
            (values,), np.mean, n_resamples=_RESAMPLES, method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        low, high = float(found.low), float(found.high)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _of_kind(answers: pa.Table, kind: str) -> pa.Table:
    return answers.filter(pa.compute.equal(answers["kind"], kind))


def _column(answers: pa.Table, name: str) -> Float[np.ndarray, " n"]:
    return np.asarray(answers[name].to_pylist(), np.float64)


def table(rows: Sequence[dict]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)
