"""The order of examples in training: a function of (seed, iteration, epoch) and nothing else.

The step number is the whole state of the data loader, so resuming needs no saved iterator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def updates_per_epoch(examples: int, global_batch: int) -> int:
    """The number of whole batches that the examples fill, as in the authors' code.

    >>> updates_per_epoch(15_283, 256)
    59
    """
    return examples // global_batch


def examples_of(
    step: int, examples: Sequence[T], *, global_batch: int, seed: int, iteration: int
) -> list[T]:
    """The `global_batch` examples of update `step` (counted from 0 across all epochs).

    >>> examples_of(0, "abcdef", global_batch=3, seed=42, iteration=1)
    ['d', 'e', 'c']
    """
    epoch, within = divmod(step, updates_per_epoch(len(examples), global_batch))
    # Sort raw bits: numpy promises never to change them, but not its permutations (NEP 19).
    bits = np.random.Philox(np.random.SeedSequence([seed, iteration, epoch]))
    order = np.argsort(bits.random_raw(len(examples)), kind="stable")
    return [examples[i] for i in order[within * global_batch : (within + 1) * global_batch]]
