"""Reports the lengths of the answers of one iteration, in tokens."""

from __future__ import annotations

from collections.abc import Sequence

from selm_jax.statistics.lengths import described, slope_metrics
from selm_jax.tables import ranked

_POLICY = ("greedy", "sample")


def lengths_of(rows: Sequence[ranked.Row]) -> dict[str, float]:
    """Measures the answers in ranked.parquet, without those that have no token ids.

    Returns:
      `length/chosen`, `length/rejected` and `length/policy` (the policy's own candidates), each
      with its quantiles, and `length/slope`, the score's change for 100 tokens more among the
      candidates of a prompt.
    """
    known = [(row, len(row.token_ids)) for row in rows if row.token_ids is not None]
    groups = {
        "length/chosen": [n for row, n in known if row.chosen],
        "length/rejected": [n for row, n in known if row.rejected],
        "length/policy": [n for row, n in known if row.source in _POLICY],
    }
    out: dict[str, float] = {}
    for name, lengths in groups.items():
        out |= described(name, lengths)
    prompts = [row.prompt_id for row, _ in known]
    lengths = [n for _, n in known]
    return out | slope_metrics("length/slope", prompts, lengths, [row.score for row, _ in known])
