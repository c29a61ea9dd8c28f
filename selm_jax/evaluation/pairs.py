"""A reward model on held-out pairs: how often it agrees with who chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("reward_chosen", pa.float32()),
        ("reward_rejected", pa.float32()),
    ]
)

_Z = 1.959963984540054  # of 95 %, both sides


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def summarize(pairs: pa.Table) -> dict[str, float]:
    """The held-out metrics of a reward model.

    Args:
      pairs: by `SCHEMA`.

    Returns:
      `heldout/accuracy`, the share of pairs whose chosen answer has the higher reward, equal rewards
      being half right; `..._low` and `..._high` bound its 95 % interval (`wilson`). Means of the
      rewards of both, of their difference, and of -log sigmoid of it (`heldout/loss`).
    """
    chosen, rejected = (_column(pairs, f"reward_{role}") for role in ("chosen", "rejected"))
    margin = chosen - rejected
    right = float(np.sum((1 + np.sign(margin)) / 2))
    low, high = wilson(right, len(margin))
    return {
        "heldout/pairs": len(margin),
        "heldout/accuracy": right / len(margin),
        "heldout/accuracy_low": low,
        "heldout/accuracy_high": high,
        "heldout/ties": int(np.sum(margin == 0)),
        "heldout/margin": float(margin.mean()),
        "heldout/reward_chosen": float(chosen.mean()),
        "heldout/reward_rejected": float(rejected.mean()),
        "heldout/loss": float(np.logaddexp(0, -margin).mean()),
    }


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, right / count (Wilson 1927, JASA 22, 209-212).

    Unlike the bootstrap it is not a point where all are right. `right` may count halves.
    """
    middle = (right + _Z**2 / 2) / (count + _Z**2)
    half = _Z / (count + _Z**2) * np.sqrt(right * (count - right) / count + _Z**2 / 4)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _column(pairs: pa.Table, name: str) -> Float[np.ndarray, " n"]:
    return np.asarray(pairs[name].to_pylist(), np.float64)
