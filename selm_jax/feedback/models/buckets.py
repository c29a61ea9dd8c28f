"""What rankers with a model share: texts of many lengths through few compiled shapes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.config.kinds import Dtype
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.parallel.rules import TRAINING, partition
from selm_jax.shell.ranges import MOST, Range
from selm_jax.shell.words import did_you_mean

BATCH = Range(1, MOST, whole=True)  # rows of 512 tokens


class Part(NamedTuple):
    """Neighbours in a list that is sorted by length, computed together.

    Attributes:
        items: their places in the list.
        rows: of their batch: a power of two per device, so that few shapes are compiled.
        time: padded length, of every row.
    """

    items: range
    rows: int
    time: int


def parts(lengths: Sequence[int], devices: int, batch: int) -> Iterator[Part]:
    """Cuts a list of texts into parts of one padded length each.

    Args:
        lengths: in tokens, the longest first: memory that does not suffice is found out at once.
        devices: over which rows are cut.
        batch: rows of 512 tokens that one device computes at once; longer ones go together in
            smaller number, shorter ones in larger.
    """
    start = 0
    while start < len(lengths):
        time = padded(lengths[start])
        most = devices * 2 ** int(math.log2(max(1, batch * 512 // time)))
        stop = start
        while stop < min(len(lengths), start + most) and padded(lengths[stop]) == time:
            stop += 1
        per_device = 2 ** math.ceil(math.log2(-(-(stop - start) // devices)))
        yield Part(range(start, stop), per_device * devices, time)
        start = stop


def padded(length: int) -> int:
    """The next of few lengths: multiples of 64, and from 512 on of 128."""
    step = 64 if length <= 512 else 128
    return -(-length // step) * step


def computed(
    these: Iterable[Part], start: Callable[[Part], jax.Array]
) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part with what `start` gives for it, on the host.

    The devices work on one part while the host builds the next.
    """
    running: deque[tuple[Part, jax.Array]] = deque()
    for part in these:
        running.append((part, start(part)))
        if len(running) == 2:
            first, values = running.popleft()
            yield first, np.asarray(values)
    for part, values in running:
        yield part, np.asarray(values)


def place(x: Any, mesh: jax.sharding.Mesh) -> jax.Array:
    """An array on the devices, cut by rows."""
    axes = ("rows", *(None,) * (x.ndim - 1))
    return jax.device_put(x, partition("batch", axes, x.shape, mesh, TRAINING))


def checked_dtype(ranker: str, name: str, on_cpu: bool) -> Any:
    """The dtype to compute in. `auto` is bfloat16, but float32 on CPU, which gains nothing by it."""
    check_choice(ranker, "dtype", name, get_args(Dtype))
    return jnp.dtype(("float32" if on_cpu else "bfloat16") if name == "auto" else name)


def checked_batch(ranker: str, batch: int | None, on_cpu: bool) -> int:
    """Rows of 512 tokens; None is 16, but 2 on CPU, whose caches hold no more."""
    if batch is None:
        return 2 if on_cpu else 16
    if (expected := BATCH.problem(batch)) is not None:
        raise FeedbackError(f"{ranker}: batch is {batch!r}; expected {expected}.")
    return int(batch)


def check_choice(ranker: str, name: str, value: str, expected: tuple[str, ...]) -> None:
    """Raises FeedbackError unless the setting has one of the values."""
    if value not in expected:
        raise FeedbackError(
            f"{ranker}: {name} is {value!r}{did_you_mean(str(value), expected)} "
            f"Expected one of {', '.join(expected)}."
        )
