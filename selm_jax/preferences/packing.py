"""Packs prompts and responses as trees into rows, the only layout of training batches.

A row contains several examples. An example is a prompt, stored once, and its distinct responses.
The drawing shows two examples, the first with responses a and b, the second with response c:

    tokens     p0 p1 p2 | a0 a1 a2 | b0 b1 | q0 q1 | c0 c1    0 0
    segment     1  1  1    1  1  1    1  1    2  2    2  2    0 0   example in this row; 0 = padding
    branch      0  0  0    1  1  1    2  2    0  0    1  1    0 0   0 = prompt, k = k-th response
    position    0  1  2    3  4  5    3  4    0  1    2  3    0 0   a branch continues its prompt
    end         8  8  8    6  6  6    8  8   12 12   12 12    0 0   1 + the last token that sees it

A token sees its own segment's prompt and its own branch. So one forward pass gives, for every
response, exactly the result of a pass over prompt + response alone. The integers `end` describe the
whole mask (`models.sight` draws it): a token is seen by itself and up to the end of its subtree.
This works for trees of any depth that are laid out depth first, such as answers with a common
beginning or branching turns. Only the scored tokens and their lists assume trees of a prompt and
its responses.

Only responses are scored. Scored tokens are listed separately, so that the unembedding, the largest
matrix, is multiplied with no other tokens:

    target     a0 a1 a2 b0 b1 c0 c1   0
    predictor   2  3  4  2  6  9 10   0   index in the row of the token that predicts the target:
                                          the one before it, or for a branch the prompt's last
    owner       0  0  0  1  1  B  B   .   its response: segment * branches + branch, both from 0
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from selm_jax.objectives.roles import PAIR, ROLES
from selm_jax.preferences.examples import Example, ExampleError


@flax.struct.dataclass
class PreferenceBatch:
    """Rows of packed prompt trees, as drawn at the top of the module.

    The fields from `roles` to `weight`, and `bonus`, are per example.

    `roles[r, s, i]` is the weight of each response of segment s for `ROLES[i]`: 1 for the response
    with this role, or equal shares if several responses explore. `reference` contains stored
    log-probabilities, and `scores` the responses' scores in the data; both are 0 if there are none.
    `weight` is 1 for an example and 0 for an empty segment. `bonus` has the count bonuses; None
    if nothing counted. `importance` has the weight of each scored token's gradient; None if all
    tokens count the same. `shared_reference` is like `reference`, but of the tokens that `shared`
    marks; None if nothing asked for it.
    """

    tokens: Int[Array, "rows time"]
    segment: Int[Array, "rows time"]
    branch: Int[Array, "rows time"]
    position: Int[Array, "rows time"]
    end: Int[Array, "rows time"]
    target: Int[Array, "rows scored"]
    predictor: Int[Array, "rows scored"]
    owner: Int[Array, "rows scored"]
    roles: Float[Array, "rows segments roles branches"]
    reference: Float[Array, "rows segments branches"]
    scores: Float[Array, "rows segments branches"]
    weight: Float[Array, "rows segments"]
    bonus: Float[Array, "rows segments"] | None = None
    importance: Float[Array, "rows scored"] | None = None
    shared_reference: Float[Array, "rows segments branches"] | None = None

    def sum_by_response(
        self, per_token: Float[Array, "rows scored"]
    ) -> Float[Array, "rows segments branches"]:
        """Sums a quantity of scored tokens over each response."""
        segments, branches = self.reference.shape[1:]
        one_more = segments * branches + 1  # the last sum collects padding and is dropped
        sums = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, one_more))(per_token, self.owner)
        return sums[:, :-1].reshape(-1, segments, branches)

    def shared(self) -> Bool[Array, "rows scored"]:
        """Whether a scored token stands within the length of its pair's shorter answer.

        The longer answer's tokens beyond that length are its tail; padding is in no answer.
        """
        lengths = self.sum_by_response(jnp.ones(self.target.shape, jnp.float32))
        of_role = jnp.sum(self.roles * lengths[:, :, None, :], axis=-1)
        shorter = jnp.min(of_role[..., [ROLES.index(role) for role in PAIR]], axis=-1)
        flat = lengths.reshape(len(lengths), -1)
        # Scored tokens are listed response by response, so sums of lengths say where each begins.
        starts = jnp.cumsum(flat, axis=-1) - flat
        stops = starts + jnp.repeat(shorter, lengths.shape[-1], axis=-1)
        stops = jnp.pad(stops, ((0, 0), (0, 1)))  # padding has an owner of its own
        return jnp.arange(self.target.shape[1]) < jnp.take_along_axis(stops, self.owner, axis=-1)

    def last_of_response(self) -> Int[Array, "rows segments branches"]:
        """The index, within its row, of each response's last token; -1 if there is no response."""
        segments, branches = self.reference.shape[1:]
        of_none = segments * branches  # prompts and padding
        owner = jnp.where(self.branch > 0, (self.segment - 1) * branches + self.branch - 1, of_none)
        place = jnp.broadcast_to(jnp.arange(self.tokens.shape[1]), self.tokens.shape)
        last = jax.vmap(lambda x, i: jax.ops.segment_max(x, i, of_none + 1))(place, owner)
        return jnp.maximum(last[:, :-1], -1).reshape(-1, segments, branches)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a batch; JAX compiles its functions once per shape."""

    rows: int
    time: int
    scored: int
    segments: int
    branches: int


def assign_rows(examples: Sequence[Example], time: int) -> list[list[int]]:
    """Assigns examples to rows of `time` tokens: longest first, each to the first row with space.

    Returns:
      The indices of the examples in each row.

    Raises:
      ExampleError: an example is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: -examples[i].tokens):
        need = examples[i].tokens
        if need > time:
            raise ExampleError(
                f"example {examples[i].prompt_id}: prompt ({len(examples[i].prompt)} tokens) and "
                f"responses ({', '.join(str(len(r)) for r in examples[i].responses)}) take {need} "
                f"tokens, but a row has {time}. Raise training.row_length, or shorten the "
                "responses (rollout.max_new_tokens)"
            )
        row = next((r for r, space in enumerate(free) if space >= need), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(time)
        rows[row].append(i)
        free[row] -= need
    return rows


def common_shape(groups: Sequence[Sequence[Example]], *, rows: int, time: int) -> Shape:
    """The smallest shape that fits the rows of every group, rounded up so that few shapes occur."""
    each_row = [_needs([g[i] for i in row]) for g in groups for row in assign_rows(g, time)]
    scored, segments, branches = map(max, zip((1, 1, 1), *each_row, strict=True))
    step = max(time // 8, 1)
    return Shape(
        rows=rows,
        time=time,
        scored=min(-(-scored // step) * step, time),
        segments=1 << (segments - 1).bit_length(),
        branches=branches,
    )


def _needs(row: Sequence[Example]) -> tuple[int, int, int]:
    """The numbers of scored tokens, segments and branches that a row needs."""
    return sum(e.scored for e in row), len(row), max(len(e.responses) for e in row)


def pack(examples: Sequence[Example], shape: Shape) -> list[PreferenceBatch]:
    """Packs examples into batches of `shape` (NumPy arrays); empty rows fill up the last batch.

    Raises:
      ExampleError: an example is longer than a row.
      ValueError: a row does not fit in `shape` (see `common_shape`).

    This is the first example of the drawing at the top of this file:

    >>> pair = {"chosen": (21, 22, 23), "rejected": (31, 32)}
    >>> example = Example.of("p0", (11, 12, 13), pair)
    >>> shape = common_shape([[example]], rows=1, time=10)
    >>> (batch,) = pack([example], shape)
    >>> batch.tokens.tolist(), batch.position.tolist()
    ([[11, 12, 13, 21, 22, 23, 31, 32, 0, 0]], [[0, 1, 2, 3, 4, 5, 3, 4, 0, 0]])
    >>> batch.target[0, :5].tolist(), batch.predictor[0, :5].tolist()
    ([21, 22, 23, 31, 32], [2, 3, 4, 2, 6])
    """
    rows = assign_rows(examples, shape.time)
    weighted = any(example.importance is not None for example in examples)
    counted = any(example.bonus is not None for example in examples)
    shared = any(example.shared_logps is not None for example in examples)
    batches = []
    for start in range(0, len(rows), shape.rows):
        batch = empty(shape, weighted, counted, shared)
        for r, members in enumerate(rows[start : start + shape.rows]):
            _fill_row(batch, r, [examples[i] for i in members], shape)
        batches.append(batch)
    return batches


def unpack(
    examples: Sequence[Example],
    shape: Shape,
    per_response: Sequence[Float[np.ndarray, "rows segments branches"]],
) -> list[tuple[float, ...]]:
    """The inverse of `pack` for one number per response: a tuple for each example, in order."""
    rows = assign_rows(examples, shape.time)
    flat = np.concatenate(per_response)
    out: list[tuple[float, ...]] = [()] * len(examples)
    for r, members in enumerate(rows):
        for s, i in enumerate(members):
            out[i] = tuple(flat[r, s, : len(examples[i].responses)])
    return out


def unpack_tokens(
    examples: Sequence[Example],
    shape: Shape,
    per_token: Sequence[Shaped[np.ndarray, "rows scored"]],
) -> list[tuple[np.ndarray, ...]]:
    """The inverse of `pack` for one number per scored token: an array for each response."""
    rows = assign_rows(examples, shape.time)
    flat = np.concatenate(per_token)
    out: list[tuple[np.ndarray, ...]] = [()] * len(examples)
    for r, members in enumerate(rows):
        at = 0
        for i in members:
            ends = at + np.cumsum([0, *map(len, examples[i].responses)])
            out[i] = tuple(flat[r, a:b] for a, b in itertools.pairwise(ends))
            at = ends[-1]
    return out


def empty(
    shape: Shape, weighted: bool = False, counted: bool = False, shared: bool = False
) -> PreferenceBatch:
    """A batch of this shape that contains no examples.

    `weighted` gives it importance weights, `counted` count bonuses, and `shared` the reference's
    log-probabilities of shared lengths.
    """

    def ints(*size) -> Any:
        return np.zeros((shape.rows, *size), np.int32)

    def floats(*size) -> Any:
        return np.zeros((shape.rows, *size), np.float32)

    return PreferenceBatch(
        tokens=ints(shape.time),
        segment=ints(shape.time),
        branch=ints(shape.time),
        position=ints(shape.time),
        end=ints(shape.time),
        target=ints(shape.scored),
        predictor=ints(shape.scored),
        owner=ints(shape.scored) + shape.segments * shape.branches,
        roles=floats(shape.segments, len(ROLES), shape.branches),
        reference=floats(shape.segments, shape.branches),
        scores=floats(shape.segments, shape.branches),
        weight=floats(shape.segments),
        bonus=floats(shape.segments) if counted else None,
        importance=1 + floats(shape.scored) if weighted else None,
        shared_reference=floats(shape.segments, shape.branches) if shared else None,
    )


def _fill_row(batch: Any, r: int, examples: Sequence[Example], shape: Shape) -> None:
    has = shape.scored, shape.segments, shape.branches
    if any(n > size for n, size in zip(_needs(examples), has, strict=True)):
        raise ValueError(
            f"a row needs (scored, segments, branches) {_needs(examples)}, but the shape has "
            f"{has}; use `common_shape` to get one that fits"
        )
    time = scored = 0
    for s, example in enumerate(examples):
        prompt_end, tree_end = time + len(example.prompt), time + example.tokens
        for k, ids in enumerate((example.prompt, *example.responses)):
            end = time + len(ids)
            batch.tokens[r, time:end] = ids
            batch.segment[r, time:end] = s + 1
            batch.branch[r, time:end] = k
            begin = 0 if k == 0 else len(example.prompt)
            batch.position[r, time:end] = np.arange(begin, begin + len(ids))
            batch.end[r, time:end] = tree_end if k == 0 else end
            if k > 0:
                stop = scored + len(ids)
                batch.target[r, scored:stop] = ids
                batch.predictor[r, scored] = prompt_end - 1
                batch.predictor[r, scored + 1 : stop] = np.arange(time, end - 1)
                batch.owner[r, scored:stop] = s * shape.branches + k - 1
                if example.importance is not None:
                    batch.importance[r, scored:stop] = example.importance[k - 1]
                scored = stop
            time = end
        for i, role in enumerate(ROLES):
            played = example.playing(role)
            for k in played:
                batch.roles[r, s, i, k] += 1 / len(played)
        batch.weight[r, s] = 1
        if example.bonus is not None:
            batch.bonus[r, s] = example.bonus
        if example.reference_logps is not None:
            batch.reference[r, s, : len(example.reference_logps)] = example.reference_logps
        if example.shared_logps is not None:
            batch.shared_reference[r, s, : len(example.shared_logps)] = example.shared_logps
        if example.scores is not None:
            batch.scores[r, s, : len(example.scores)] = example.scores
