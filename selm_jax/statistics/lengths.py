"""Describes the lengths of answers, and how much a score rises with length.

A policy can gain reward by writing longer answers alone. So every iteration reports the lengths of
the answers that it trains on and of those that it gives, and the slope of the score over length.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

QUANTILES = (10, 50, 90)  # per cent
UNIT = 100  # tokens: the slope is the score's change for so many more


def described(name: str, lengths: Sequence[int]) -> dict[str, float]:
    """The mean and the quantiles of some lengths, as `NAME`, `NAME_p10`, `NAME_p50`, `NAME_p90`.

    It is empty without lengths.
    """
    if not lengths:
        return {}
    found = np.percentile(lengths, QUANTILES)
    quantiles = {f"{name}_p{q}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
    return {name: float(np.mean(lengths)), **quantiles}


def slope(
    prompts: Sequence[Hashable], lengths: Sequence[int], scores: Sequence[float]
) -> tuple[float, float | None] | None:
    """The change of the score for 100 tokens more, among the answers to one prompt.

    It is the least-squares slope after the mean of each prompt is subtracted from both, so that
    prompts that are hard or ask for long answers do not matter. Its standard error treats prompts
    as clusters (Liang and Zeger, Biometrika 73, 1986), with the factor n / (n - 1) in its square
    for n prompts whose answers differ in length.

    Args:
      prompts, lengths, scores: of each answer; an answer whose score is NaN does not count.

    Returns:
      (slope, standard error); the error is None if only one prompt has two scored answers of
      different lengths, and the whole is None if no prompt has.
    """
    values = np.array([lengths, scores], np.float64)
    known = np.isfinite(values[1])
    values = values[:, known]
    kept = [prompt for prompt, there in zip(prompts, known, strict=True) if there]
    numbers = {prompt: n for n, prompt in enumerate(dict.fromkeys(kept))}
    of = np.array([numbers[prompt] for prompt in kept], np.int64)
    count = np.bincount(of)
    x, y = (row - (np.bincount(of, row) / count)[of] for row in values)
    square = float(x @ x)
    if not square:
        return None
    rise = float(x @ y) / square
    of_prompt = np.bincount(of, x * (y - rise * x))
    if (n := np.count_nonzero(np.bincount(of, x * x))) == 1:
        return UNIT * rise, None
    return UNIT * rise, UNIT * float(np.sqrt(of_prompt @ of_prompt * n / (n - 1))) / square


def slope_metrics(
    name: str, prompts: Sequence[Hashable], lengths: Sequence[int], scores: Sequence[float]
) -> dict[str, float]:
    """`slope` as the metrics `NAME` and `NAME_stderr`, without those that there are not."""
    rise, error = slope(prompts, lengths, scores) or (None, None)
    metrics = {name: rise, f"{name}_stderr": error}
    return {key: value for key, value in metrics.items() if value is not None}
