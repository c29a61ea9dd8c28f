"""The sizes of a run's batches: chosen once, kept in its folder, and lowered if memory runs out.

`policy.sizes` does the arithmetic. Here are the facts that it needs, from the abstract arrays of
the run's own programs, and the record in `manifest.json`, from which a resumed run takes its sizes
whatever is free by then: other sizes would round some answers differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from selm_jax.config import Experiment, as_dict, fixed_length, read
from selm_jax.feedback.ranker import Ranker, batches_of
from selm_jax.models.attention import holds_all_scores
from selm_jax.models.config import DecoderConfig
from selm_jax.parallel import multihost
from selm_jax.parallel.mesh import platform_of
from selm_jax.policy import sizes
from selm_jax.policy.needs import generation
from selm_jax.policy.sizes import KEYS, BatchSizes, Generation, Room, Training
from selm_jax.preferences.layouts import row_lengths
from selm_jax.run.memory import MARGIN, least_of_training
from selm_jax.run.programs import Programs
from selm_jax.run.remaining import entries_of
from selm_jax.run.task import Sizes, Task
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.memory import device_limit, shard_bytes
from selm_jax.shell.shared_stages import SharedStages
from selm_jax.shell.user_code import is_user_code
from selm_jax.shell.words import sizes_in_words


@dataclasses.dataclass(frozen=True)
class Choice:
    """The sizes of a run's batches, and what they were chosen from.

    Attributes:
      because: the memory, lengths and counts, in words.
      note: a warning for the user; "" if there is none.
      lowered: what was given up after memory ran out, in words.
      generation, training: what a smaller choice depends on.
      fixed: the sizes that the experiment gives.
      ranker: the batches of the ranker's models after memory ran out; () if it did not.
    """

    sizes: BatchSizes
    because: str
    generation: Generation | None
    training: Training
    fixed: dict[str, Any]
    note: str = ""
    lowered: tuple[str, ...] = ()
    ranker: tuple[int, ...] = ()

    @property
    def automatic(self) -> list[str]:
        return [name for name in KEYS if name not in self.fixed]

    @property
    def chosen(self) -> dict[str, Any]:
        """The sizes that were chosen, by dotted key."""
        return {KEYS[name]: getattr(self.sizes, name) for name in self.automatic}

    @property
    def floors(self) -> dict[str, int]:
        """The least values of the sizes that devices share, which divide all others."""
        copies = 1 if self.generation is None else self.generation.copies
        return {"slots": copies, "prefill_rows": copies, "rows": self.training.ways}

    @property
    def line(self) -> str:
        """Says in one line what was chosen and why; "" if the experiment gives all sizes."""
        told = sizes_in_words(self.chosen, self.because, self.lowered)
        return f"sizes: {told}" if told else ""

    @property
    def has_plenty(self) -> bool:
        """Says whether this process has a CPU with twice the memory that each stage needs."""
        device = jax.local_devices()[0]
        if device.platform != "cpu":
            return False
        stages = filter(None, (self.generation, self.training))
        most = max(of.total(self.sizes) for of in stages)
        return 2 * (MARGIN + most) <= device_limit(device)[0]

    def described(self) -> dict[str, Any]:
        """The entries of `manifest.json`."""
        return {
            "sizes": self.chosen,
            "sizes_chosen_for": self.because if self.automatic else "",
            "sizes_lowered": list(self.lowered),
            **({"ranker_batches": list(self.ranker)} if self.ranker else {}),
        }

    def kept(self, manifest: Mapping[str, Any]) -> Choice:
        """This choice with what `manifest.json` says that the run has used until now.

        Its sizes are rounded up to what these devices can share evenly: the run may have begun on
        fewer.
        """
        names = {key: name for name, key in KEYS.items()}
        before = {names[key]: value for key, value in manifest.get("sizes", {}).items()}
        before = {name: value for name, value in before.items() if name not in self.fixed}
        kept = dataclasses.replace(
            self, lowered=tuple(manifest.get("sizes_lowered", ())),
            ranker=tuple(manifest.get("ranker_batches", ())),
        )  # fmt: skip
        if not before:
            return kept
        floors = self.floors
        for name in before.keys() & floors.keys():
            before[name] = -(-before[name] // floors[name]) * floors[name]
        return dataclasses.replace(
            kept, sizes=dataclasses.replace(self.sizes, **before), note="",
            because=f"as the run began, {manifest['sizes_chosen_for'].removeprefix(_BEGAN)}",
        )  # fmt: skip

    def smaller(self, stage: str) -> Choice | None:
        """The choice with less memory for a stage; None if nothing is left to give up."""
        needs: dict[str, int] = {}
        if stage in ("generate", "evaluate") and self.generation is not None:
            needs |= self.generation.needs(self.sizes)
        if stage in ("score", "evaluate", "train"):
            needs |= self.training.needs(self.sizes, backward=stage == "train")
        found = sizes.smaller(self.sizes, needs, self.fixed, self.floors)
        if found is None:
            return None
        changed = [name for name in KEYS if getattr(found, name) != getattr(self.sizes, name)]
        words = ", ".join(f"{KEYS[name]} {getattr(found, name)}" for name in changed)
        told = f"{stage} ran out of memory, so {words}"
        return dataclasses.replace(self, sizes=found, lowered=(*self.lowered, told))

    def with_ranker(self, stage: str, batches: Sequence[int]) -> Choice:
        """The choice after the ranker has lowered the batches of its models in a stage."""
        if tuple(batches) == self.ranker:
            return self
        words = " and ".join(map(str, batches))
        told = f"{stage}: the ranker ran out of memory, so its batch {words}"
        return dataclasses.replace(self, ranker=tuple(batches), lowered=(*self.lowered, told))


_BEGAN = "as the run began, "


def choose(draft: Programs, prompts: Sequence[int], heldout: int, room: Room) -> Choice:
    """Chooses the sizes that an experiment leaves to `auto`.

    Args:
      draft: its programs with any sizes, of which only abstract parameters are used.
      prompts: the number of prompts of each iteration.
      heldout: the number of held-out prompts.
      room: the memory of a device.
    """
    e, platform = draft.experiment, platform_of(draft.devices.mesh)
    fixed = sizes.given(as_dict(e))
    answers = _generation(draft, prompts, heldout) if draft.task.answers else None
    training = _training(draft)
    found = sizes.choose(answers, training, room.bytes, platform, fixed)
    asked = "" if answers is None else f"{answers.told}, "
    because = f"{asked}rows of {training.length:,} tokens, {room.source}"
    return Choice(found, because, answers, training, fixed, room.note)


def _generation(draft: Programs, prompts: Sequence[int], heldout: int) -> Generation:
    e, d = draft.experiment, draft.devices
    each, part = e.candidates.greedy + e.candidates.samples, e.rollout.prompts_per_part
    asked = [] if e.rollout.remote is not None else [
        min(part, count - first) * each for count in prompts for first in range(0, count, part)
    ]  # fmt: skip
    asked += [heldout * (1 + e.evaluation.samples)] * (1 + e.iterations)
    return generation(
        draft.config, d.dtype, d.decode_mesh,
        prompt=max(draft.sizes.longest_prompt, 1), new_tokens=e.rollout.max_new_tokens,
        wanted=[n for n in asked if n], each=each, attention=e.compute.attention,
        beside=0 if e.data.heldout is None else shard_bytes(draft.abstract_params),
        mixture=e.rollout.mixture,
    )  # fmt: skip


def _training(draft: Programs) -> Training:
    e = draft.experiment
    fixed = fixed_length(e.training.row_length)
    length = fixed or row_lengths(longest_example(e, draft.task, draft.sizes))[-1]
    shortest = fixed or row_lengths(longest_example(e, draft.task, draft.sizes))[0]
    return facts_of_training(draft, length, e.training.global_batch, shortest)


def facts_of_training(
    draft: Programs, length: int, examples: int, shortest: int | None = None
) -> Training:
    """The facts that the sizes of training depend on.

    Args:
      draft: the programs with any sizes.
      length: the tokens of a row.
      examples: the number of examples of an update.
      shortest: the tokens of the shortest row that may be chosen; None for `length`.
    """
    e, platform = draft.experiment, platform_of(draft.devices.mesh)
    parts, itemsize = least_of_training(draft), jnp.dtype(draft.devices.dtype).itemsize
    held = sum(parts.values())
    if draft.devices.row_ways > 1:  # shards are gathered
        held += itemsize * gathered(draft.config, draft.parameters)
    return Training(
        draft.config, draft.devices.row_ways, length, examples, held, itemsize,
        whole_scores=holds_all_scores(e.compute.attention, length, platform),
        second=parts["gradients"], shortest=shortest,
    )  # fmt: skip


def gathered(c: DecoderConfig, parameters: int) -> int:
    """Estimates how many of a model's parameters a device holds gathered from all shards.

    These are the unembedding and two layers.
    """
    unembedding = c.vocab_size * c.embed
    # One step of the scan computes a cycle of layers, and the compiler may gather them all at once.
    layers = max(2, c.cycle)
    return unembedding + layers * (parameters - unembedding) // c.layers


def longest_example(e: Experiment, task: Task, lengths: Sizes) -> int:
    """The number of tokens of the longest example that the settings allow.

    If the data gives answers, they have any length that fits in a row. If rows have any length
    too, these answers are assumed to be as long as the policy's may be.
    """
    fixed = fixed_length(e.training.row_length)
    if e.candidates.dataset and fixed is not None:
        return fixed
    if e.text.layout == "paper":
        return responses(e, task) * e.text.max_length
    return max(lengths.longest_prompt, 1) + responses(e, task) * e.rollout.max_new_tokens


def responses(e: Experiment, task: Task) -> int:
    """The maximum number of distinct responses in an example."""
    several = e.feedback.explore == "all" or is_user_code(e.feedback.explore)
    if not several or "explore" not in task.objective.roles:
        return len(task.objective.roles)
    return e.candidates.greedy + e.candidates.samples + 2 * e.candidates.dataset


# --- what a run folder says -----------------------------------------------------------------------


def begun_with(e: Experiment, folder: Path) -> dict[str, Any]:
    """The sizes that are `auto` in the experiment, but numbers in the `config.yaml` of its run.

    A run that began with numbers, as all runs of earlier versions did, goes on with them: its
    finished stages depend on them.
    """
    file, fixed = folder / "config.yaml", sizes.given(as_dict(e))
    if len(fixed) == len(KEYS) or not file.exists():
        return {}
    before = sizes.given(read(file))
    return {KEYS[name]: value for name, value in before.items() if name not in fixed}


def room_in(store: SharedStages | None, device: Any) -> Room:
    """The least memory of a device of all processes; in a sweep the one that its first run found.

    So the runs of a sweep choose like sizes and compile their programs once, whatever is free when
    each of them starts. They get other memory from then on if a device now has less in all, or if
    little was free for the first run and no longer is.

    Args:
      store: the finished stages of the sweep; None if the run belongs to none.
      device: a device of this process.
    """
    rooms = multihost.on_every(lambda: dataclasses.asdict(sizes.room(device)))
    whole = min(multihost.on_every(lambda: sizes.whole_room(device)))
    least = min(rooms, key=lambda room: room["bytes"])

    def agreed() -> dict[str, Any]:
        if store is None:
            return least
        file, kind = mirrors.need(store.folder / "room.json"), device.device_kind
        known = artifacts.read_sealed(file) if file.exists() else {}
        if (first := known.get(kind)) is not None:
            freed = first["note"] and not least["note"]
            if first["bytes"] <= whole and not freed:
                return first | {"note": ""}  # which was said of another run
        artifacts.write_sealed(file, known | {kind: least})
        return least

    return Room(**multihost.on_first(agreed))


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; {} if no work depends on its sizes.

    So a run that was stopped to free memory chooses again. Sizes that were lowered stay: memory ran
    out with those before.
    """
    file = folder / "manifest.json"
    if not file.exists():
        return {}
    manifest = artifacts.read_sealed(file)
    done = any(entry["done"] for each in entries_of(folder).values() for entry in each.values())
    return manifest if done or manifest.get("sizes_lowered") else {}


def remembered(ranker: Ranker, folder: Path) -> Ranker:
    """The ranker, with the batches of its models that a run's manifest remembers."""
    before = manifest_of(folder).get("ranker_batches", ())
    for batch, rows in zip(batches_of(ranker), before, strict=False):
        batch.lower(rows)
    return ranker
