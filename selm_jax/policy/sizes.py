"""Chooses the sizes of batches by arithmetic, from memory, lengths and the number of answers.

An experiment that sets `auto` gets the sizes from here: always the same ones for the same memory,
lengths and counts. The memory is that of the machine, or what is free if that is much less. Sizes
decide how long a run takes and whether it fits. They do not decide what it computes, except that
matrix products of other shapes are rounded differently.

    choose(generation, training, room, platform, fixed) -> BatchSizes
    smaller(sizes, needs, fixed, floors) -> BatchSizes with the largest part halved

All bytes are those of one device. What lies in memory for the whole stage is known exactly; what
a program needs besides is estimated, so a share of the memory is reserved (`room`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import jax

from selm_jax.config import Experiment, as_dict
from selm_jax.config.kinds import Remat
from selm_jax.models.config import DecoderConfig
from selm_jax.shell.memory import device_limit, free_memory, gib, left_of_limit


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The sizes of an experiment's batches; the attributes are settings (`KEYS`)."""

    slots: int
    prefill_rows: int
    rows: int
    remat: Remat
    chunk: int


_SETTINGS = {
    "slots": ("rollout", "slots"), "prefill_rows": ("rollout", "prefill_rows"),
    "rows": ("training", "rows"), "remat": ("training", "remat"),
    "chunk": ("training", "logprob_chunk"),
}  # fmt: skip
KEYS = {name: ".".join(setting) for name, setting in _SETTINGS.items()}
LEAST = BatchSizes(slots=1, prefill_rows=1, rows=1, remat="full", chunk=32)
_REMATS: tuple[Remat, ...] = get_args(Remat)

_MOST_SLOTS = 256  # of a copy of the model; beyond that a step takes longer in proportion
_STEP = 32  # the fixed cost of a decoding step, in slots
# Tokens of a batch on a device with which its matrix products reach nearly their full speed. Each
# batch of training also adds gradients, which takes a smaller share of a larger batch.
_PREFILL, _TRAIN, _ELSEWHERE = {"cpu": 1024}, {"cpu": 2048}, 8192
_CHUNK = 512  # tokens on a device whose logits are computed at once


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that an experiment's settings have as a number or a name, and not as `auto`.

    Args:
      settings: nested, as in an experiment file; what is missing is `auto`.
    """
    found = {name: settings.get(group, {}).get(key) for name, (group, key) in _SETTINGS.items()}
    return {name: value for name, value in found.items() if value not in (None, "auto")}


def least(e: Experiment) -> BatchSizes:
    """The given sizes of an experiment, and the least value of all others."""
    return dataclasses.replace(LEAST, **given(as_dict(e)))


def with_sizes(e: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with other sizes, by dotted key."""
    for name, (group, key) in _SETTINGS.items():
        if KEYS[name] in values:
            part = dataclasses.replace(getattr(e, group), **{key: values[KEYS[name]]})
            e = dataclasses.replace(e, **{group: part})
    return e


# --- memory ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Room:
    """The bytes of a device that programs may use, where they come from, and a note for the user.

    Attributes:
      note: says that much less is free than the machine has; "" if that is not so.
    """

    bytes: int
    source: str
    note: str = ""


def room(device: Any) -> Room:
    """The memory of a local device, or what is free of it now, less a reserve.

    What is free counts on a CPU only, if it is less than 3/8 of the memory: half of what the
    reserve would leave.
    """
    limit, source = device_limit(device)
    if device.platform != "cpu":
        return room_of(limit, source, device.platform)
    devices, left, free = len(jax.local_devices()), left_of_limit(), free_memory()
    if left is not None and left // devices < limit:
        limit, source = left // devices, "left of this process's limit (ulimit -v)"
    if free is not None and (free := free // devices) < limit * 3 // 8:
        note = (
            f"only {gib(free)} GiB of memory are free now, so batches are chosen for that. For "
            "larger ones close other programs and start again"
        )
        return dataclasses.replace(room_of(free, "free now", device.platform), note=note)
    return room_of(limit, source, device.platform)


def whole_room(device: Any) -> int:
    """The bytes of a local device that programs could use if nothing else ran."""
    return room_of(*device_limit(device), device.platform).bytes


def room_of(limit: int, source: str, platform: str) -> Room:
    """The memory of a device with `limit` bytes, less a reserve for what is not counted here.

    The reserve is a sixteenth of an accelerator. Of a CPU's memory it is a quarter: the
    interpreter, the data and the compiler need it too.
    """
    share, part = (4, "a quarter") if platform == "cpu" else (16, "a sixteenth")
    left = limit - limit // share
    told = f"{gib(left)} GiB of memory: {gib(limit)} GiB ({source}) less {part} in reserve"
    return Room(left, told)


@dataclasses.dataclass(frozen=True)
class Generation:
    """The facts that the choice of slots and prefill rows depends on.

    Attributes:
      wanted: the number of answers of each call of the engine.
      each: the number of answers to a prompt.
      copies: the number of copies of the model, which share slots and rows evenly.
      prompt: the tokens of a padded prompt.
      held: bytes of the weights, and of what else stays in memory.
      slot: bytes of a slot's cache and state.
      row: bytes of a prefilled prompt, and of what its prefill needs.
      caches: the number of caches that there are while a program decodes.
    """

    wanted: Sequence[int]
    each: int
    copies: int
    prompt: int
    held: int
    slot: int
    row: int
    caches: int = 3

    @property
    def told(self) -> str:
        return f"{max(self.wanted, default=0):,} answers to prompts of {self.prompt:,} tokens"

    def needs(self, sizes: BatchSizes) -> dict[str, int]:
        """The bytes that each size takes."""
        slots, rows = (-(-n // self.copies) for n in (sizes.slots, sizes.prefill_rows))
        return {"slots": self.caches * slots * self.slot, "prefill_rows": rows * self.row}

    def total(self, sizes: BatchSizes) -> int:
        """The bytes of a stage with these sizes."""
        return self.held + sum(self.needs(sizes).values())


@dataclasses.dataclass(frozen=True)
class Training:
    """The facts that the choice of rows, rematerialization and chunk depends on.

    Attributes:
      config: the model.
      ways: the number of parts into which the mesh splits rows.
      length: the tokens of a row.
      examples: the number of examples of an update, which never need more rows.
      held: bytes of parameters, gradients and moments, and of what else stays in memory.
      itemsize: bytes of an activation.
      whole_scores: whether attention has the scores of a whole row in memory at once.
      second: bytes of the gradients of a batch, which an update of several batches adds to the sum.
      shortest: the tokens of the shortest row that holds any example; None for `length`.
    """

    config: DecoderConfig
    ways: int
    length: int
    examples: int
    held: int
    itemsize: int
    whole_scores: bool
    second: int = 0
    shortest: int | None = None

    def in_one_batch(self, rows: int) -> bool:
        """Says whether an update is one batch for certain: each row holds at least one example."""
        return rows >= self.examples

    def total(self, sizes: BatchSizes) -> int:
        """The bytes of an update with these sizes."""
        second = 0 if self.in_one_batch(sizes.rows) else self.second
        return self.held + second + sum(self.needs(sizes).values())

    def needs(self, sizes: BatchSizes, backward: bool = True) -> dict[str, int]:
        """The bytes that each size takes: what is stored, recomputed, and scored at once.

        The counts of stored values for each token follow `models.decoder.REMAT`.

        Args:
          backward: whether there is a backward pass, for which something is stored.
        """
        c, rows = self.config, -(-sizes.rows // self.ways)
        # The one batch of an update has the shape with the least padding, which is no larger.
        one = backward and self.in_one_batch(sizes.rows)
        length = self.shortest if one and self.shortest is not None else self.length
        tokens, mlp = rows * length, _mlp(c)
        every = _projected(c)
        layers = of_layers(c, self.length if self.whole_scores else 0)
        stored = {
            "none": sum(layers) - c.layers * c.embed, "dots": sum(every) + 2 * c.layers * mlp,
            "mlp": 2 * c.layers * mlp, "full": 0,
        }[sizes.remat]  # fmt: skip
        chunk = 3 * 4 * rows * min(sizes.chunk, self.length) * c.vocab_size
        if not backward:
            return {"rows": max(layers) * tokens * self.itemsize, "chunk": chunk}
        return {
            "remat": stored * tokens * self.itemsize,
            "rows": (c.embed * c.layers + max(layers)) * tokens * self.itemsize,
            "chunk": chunk,
        }


def of_layers(c: DecoderConfig, scores: int) -> list[int]:
    """The values that each layer computes for each token.

    Args:
      scores: the keys whose scores are in memory at once, of every head; 0 for blocks of them.
    """
    rest = 8 * c.embed + 6 * _mlp(c) + 3 * c.heads * scores
    return [rest + 2 * projected for projected in _projected(c)]


def _mlp(c: DecoderConfig) -> int:
    return c.mlp * (c.mixture.active if c.mixture else 1)


def _projected(c: DecoderConfig) -> list[int]:
    return [(2 * of.heads + 2 * of.kv_heads) * of.head_dim for of in c.each_layer]


# --- the choice -----------------------------------------------------------------------------------


def choose(
    generation: Generation | None, training: Training | None, room: int, platform: str,
    fixed: dict[str, Any],
) -> BatchSizes:  # fmt: skip
    """Chooses sizes with which each stage fits into `room` bytes, or the least ones.

    Args:
      generation: None if the model answers no prompts.
      training: None if the model is not trained.
      fixed: sizes that are not to be chosen.
    """
    sizes = dataclasses.replace(LEAST, **fixed)
    if generation is not None:
        busy = _PREFILL.get(platform, _ELSEWHERE)
        sizes = _for_generation(generation, room - generation.held, busy, sizes, fixed)
    if training is None:
        return sizes
    busy = _TRAIN.get(platform, _ELSEWHERE)
    return _for_training(training, room, busy, sizes, fixed)


def _for_generation(
    g: Generation, room: int, busy: int, sizes: BatchSizes, fixed: dict[str, Any]
) -> BatchSizes:
    """Chooses slots that need the fewest steps, and prefill rows that keep a device busy."""
    if "slots" not in fixed:
        most = min(_MOST_SLOTS, max(1, room * 3 // 4 // (g.caches * g.slot)))
        sizes = dataclasses.replace(sizes, slots=_slots(g.wanted, g.copies, most))
    if "prefill_rows" not in fixed:
        prompts = -(-sizes.slots // (g.each * g.copies))  # whose answers fill a copy's slots
        rows = min(busy // g.prompt, prompts, room // 4 // g.row)
        sizes = dataclasses.replace(sizes, prefill_rows=_power(rows) * g.copies)
    return sizes


def _slots(wanted: Sequence[int], copies: int, most: int) -> int:
    """The slots with which all answers need the least time, at most `most` for each copy.

    With n slots, a call for w answers takes w / n turns, rounded up, each as long as an answer.

    >>> _slots([320, 96], 1, 256), _slots([1024], 4, 256), _slots([20], 1, 256)
    (112, 1024, 24)
    """
    step = 8 if most >= 8 else 1
    counts = range(step, most + 1, step)

    def time(n: int) -> tuple[int, int]:
        return sum(-(-w // (n * copies)) for w in wanted) * (_STEP + n), n

    return min(counts, key=time) * copies


def of_ranker(most: int, held: int, row: int, room: int) -> int:
    """The rows that a ranker computes at once on a device: at most `most`, and those that fit.

    Args:
      held: bytes of its weights; row: bytes that a row needs.
    """
    return _power(min(most, (room - held) // row))


def _for_training(
    t: Training, room: int, busy: int, sizes: BatchSizes, fixed: dict[str, Any]
) -> BatchSizes:
    """Chooses rows that keep a device busy, and stores as much as fits for the backward pass."""
    rows = _power(min(busy // t.length, -(-t.examples // t.ways)))
    if "rows" in fixed:
        rows = -(-fixed["rows"] // t.ways)
    while True:
        chunk = max(LEAST.chunk, _CHUNK // rows)
        for remat in _REMATS:
            wanted = {"rows": rows * t.ways, "remat": remat, "chunk": _power(chunk)} | fixed
            found = dataclasses.replace(sizes, **wanted)
            if t.total(found) <= room:
                return found
        if rows == 1 or "rows" in fixed:
            return min(_least(t, found, fixed), key=t.total)
        rows //= 2


def _least(t: Training, sizes: BatchSizes, fixed: dict[str, Any]) -> Iterator[BatchSizes]:
    """Yields the sizes that may need the least: one row for each device, or all in one batch.

    One batch needs no second tree of gradients.
    """
    yield dataclasses.replace(sizes, **{"chunk": LEAST.chunk} | fixed)
    rows = -(-t.examples // t.ways)
    one = {"rows": rows * t.ways, "remat": LEAST.remat, "chunk": max(8, LEAST.chunk // rows)}
    yield dataclasses.replace(sizes, **one | fixed)


def _power(n: int) -> int:
    """The largest power of two that is at most n, and at least 1."""
    return 1 << max(1, n).bit_length() - 1


# --- after a program did not fit ------------------------------------------------------------------


def smaller(
    sizes: BatchSizes, needs: Mapping[str, int], fixed: dict[str, Any], floors: Mapping[str, int]
) -> BatchSizes | None:
    """Halves the size that takes the most memory; None if all are fixed or as small as they can be.

    Args:
      needs: the bytes that each size of the stage takes.
      fixed: the sizes that the user gave, which stay.
      floors: the least slots, prefill rows and rows, which divide all others.
    """
    floors = {**floors, "chunk": LEAST.chunk}
    for name in sorted(needs, key=lambda each: -needs[each]):
        value = getattr(sizes, name)
        if name in fixed or value in (floors.get(name), "full"):
            continue
        if name == "remat":
            return dataclasses.replace(sizes, remat=_REMATS[_REMATS.index(value) + 1])
        floor = floors[name]
        return dataclasses.replace(sizes, **{name: max(floor, value // 2 // floor * floor)})
    return None
