"""A language model for use from Python, which a `Trainer` can train in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32

from selm_jax import config
from selm_jax.api.answers import Answers
from selm_jax.api.errors import ApiError
from selm_jax.api.pairs import Pairs
from selm_jax.api.prompts import PromptLike, read_prompts
from selm_jax.commands.runs import set_up_jax
from selm_jax.evaluation.model import find
from selm_jax.models.decoder import Params
from selm_jax.models.lora import merge
from selm_jax.models.quantize import dequantize
from selm_jax.objectives.roles import ROLES
from selm_jax.policy.policy import Batches, Policy, numbered
from selm_jax.policy.sizes import BatchSizes
from selm_jax.preferences.candidates import Candidate
from selm_jax.preferences.examples import Example
from selm_jax.rollout.sampling import Filter, Sampling
from selm_jax.run.devices import Devices
from selm_jax.run.model import StartModel
from selm_jax.run.programs import Programs, iteration_key
from selm_jax.run.task import Sizes, Task, task_of
from selm_jax.shell import artifacts
from selm_jax.shell.paths import folder_to_write
from selm_jax.shell.progress import bar, terminal
from selm_jax.weights.export import export_folder

Settings = Mapping[str, Any]


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    iteration: int | None = None,
    lora: Settings | None = None,
    compute: Settings | None = None,
    text: Settings | None = None,
    parameter_dtype: str = config.Training.parameter_dtype,
    slots: int | Literal["auto"] = "auto",
    devices: Sequence[Any] | None = None,
) -> Model:
    """Opens a language model to answer, score and train. Its weights are read on first use.

    Args:
      source: a Hugging Face folder, a Hub id, a GGUF file, or a run folder.
      revision: the branch, tag or commit of a Hub id.
      iteration: for a run folder, the iteration whose model is opened; 0 is the start model, None
        the last one.
      lora: trains adapters instead of all parameters, with the settings `lora` of an experiment
        file, such as `{"rank": 16, "alpha": 32}`.
      compute: how the model is sharded over the devices, with the settings `compute`, such as
        `{"preset": "fsdp", "fsdp": 4}`. By default the parameters are sharded over all devices.
      text: settings of the chat template and tokenizer, as in `text` of an experiment file.
      parameter_dtype: the dtype of the parameters, "float32" or "bfloat16".
      slots: the number of answers that are drawn at the same time; "auto" chooses it from the
        memory of the devices (docs/memory.md).
      devices: the devices to use; None uses all of them.

    Raises:
      SourceError: there is no such model.
      ConfigError: a setting is unknown or out of its range.
      RunError: the model is a reward model and cannot generate text.
    """
    set_up_jax()
    found = find(str(source), revision=revision, iteration=iteration)
    if text is None and found.experiment is not None:
        text = config.as_dict(found.experiment.text)
    experiment = _experiment(
        "selm.load",
        model={"source": found.source, "revision": found.revision},
        training={"parameter_dtype": parameter_dtype},
        lora=lora, compute=compute or {}, text=text or {}, rollout={"slots": slots},
    )  # fmt: skip
    start = StartModel(experiment, task_of({"loss": "sft"}), terminal(stderr=True))
    return Model(found.name, start, Devices(experiment.compute, devices))


def _experiment(where: str, *, training: Settings, **groups: Any) -> config.Experiment:
    """Makes and checks an experiment with the given settings and placeholders for the others."""
    unread = {
        "output": "unread", "iterations": 1, "data": {"train": "unread"},
        "objective": {"loss": "unread"}, "candidates": {"samples": 1, "dataset": False},
    }  # fmt: skip
    training = {"learning_rate": 1.0, "global_batch": 1, **training}
    return config.parse(unread | groups | {"training": training}, where)


class Model:
    """A language model, opened by `selm.load`.

    Attributes:
      name: its name in tables and error messages.
      updates: the number of updates that `Trainer`s have made to it.
      experiment: its settings, in the form of an experiment file.
    """

    def __init__(self, name: str, start: StartModel, devices: Devices):
        self.name, self.updates, self.experiment = name, 0, start.experiment
        self._start, self._devices = start, devices
        self._kept_base: Params | None = None  # the base model of the adapters
        self._adapters: Params | None = None
        self._programs = Programs(
            self.experiment, start.task, start.facts, Sizes(0, 0), start.chat.stop_ids, devices
        )
        slots = self.experiment.rollout.slots
        self._policy = Policy(
            name, self._read, start.facts,
            chat=lambda: start.chat, stop_ids=lambda: start.chat.stop_ids,
            mesh=devices.mesh, decode_mesh=devices.decode_mesh, dtype=devices.dtype,
            rules=devices.rules, batches=Batches(None if slots == "auto" else slots),
            say=partial(start.console.print, soft_wrap=True, markup=False, highlight=False),
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        greedy: int = 1,
        samples: int = 0,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        filter: Filter | None = None,
        seed: int = 0,
    ) -> Answers:
        """Generates answers to the prompts.

        Args:
          prompts: texts, or conversations that end with a user's turn.
          greedy: 1 for a greedy answer, the paper's y_ref; 0 for none.
          samples: the number of sampled answers per prompt, in addition to the greedy one.
          max_new_tokens: the longest answer in tokens; longer ones are cut off.
          temperature, top_k, top_p, min_p: how samples are drawn, as in `rollout`.
          filter: your own function that changes the logits before a sample is drawn.
          seed: decides the samples, together with the place of the prompt in the list and the
            number of the sample. Use another seed for each iteration.

        Raises:
          ApiError: there are no prompts, one is not a conversation, or no answers are wanted.
          ChatError: the chat template rejects a conversation.
          PolicyError: a prompt leaves no room for its answer.
        """
        read = read_prompts(prompts)
        if greedy not in (0, 1) or samples < 0 or greedy + samples == 0 or max_new_tokens < 1:
            raise ApiError(
                f"greedy={greedy}, samples={samples}, max_new_tokens={max_new_tokens}: nothing can "
                "be answered. Set greedy to 0 or 1, samples to 1 or more, and max_new_tokens above "
                "0"
            )
        ids = self._policy.prompt_ids([each.messages for each in read])
        with bar(self._start.console, "answers", len(ids) * (greedy + samples), "answers") as told:
            responses = self._policy.answer(
                numbered(ids, greedy=greedy, samples=samples), max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature, top_k, top_p, min_p, filter=filter), seed=seed,
                progress=told,
            )  # fmt: skip
        found: list[list[Candidate]] = [[] for _ in ids]
        for r in responses:
            text, source = self._policy.chat.text(r.tokens), "greedy" if r.greedy else "sample"
            found[r.index].append(Candidate(source, text, tuple(r.tokens), r.finish, r.sample))
        return Answers(tuple(read), tuple(ids), tuple(map(tuple, found)), self, self.updates)

    def logps(self, pairs: Pairs) -> dict[str, Float32[np.ndarray, " pairs"]]:
        """log pi(response | prompt) of each pair's responses under the current parameters.

        Returns:
          For each role ("chosen", "rejected", "explore") a float32 array `[pairs]`, in nats. If a
          pair has several explored responses, it is their mean.

        Raises:
          ApiError: the pairs were made with another tokenizer.
        """
        found = self._scores_of(pairs.examples, pairs.tokenizer)

        def of_role(role: str) -> Float32[np.ndarray, " pairs"]:
            each = [
                np.mean([logps[i] for i in example.playing(role)], dtype=np.float32)
                for example, logps in zip(pairs.examples, found, strict=True)
            ]
            return np.array(each, np.float32)

        return {role: of_role(role) for role in ROLES}

    def _scores_of(self, examples: Sequence[Example], tokenizer: str) -> list[tuple[float, ...]]:
        """Computes log pi, in nats, of every distinct response of every example.

        Raises:
          ApiError: `tokenizer` is not the digest of this model's tokenizer.
        """
        self._check_tokenizer(tokenizer)
        with bar(self._start.console, "log-probabilities", len(examples), "pairs") as told:
            return self._policy.logps(examples, told)

    def save(self, folder: str | Path) -> Path:
        """Writes the model as a new Hugging Face folder; adapters are merged into their base.

        Raises:
          ApiError: the folder already exists.
        """
        folder = folder_to_write(str(folder))
        if folder.exists():
            raise ApiError(f"{folder} already exists. Give the name of a new folder")
        with artifacts.whole(folder) as partial:
            params, source = self._policy.weights.to_score(), self._start.folder.path
            card, keep = self._card(), self.experiment.model.keep_vision
            export_folder(params, self._programs.config, source, partial, card, keep_vision=keep)
        return folder

    def _card(self) -> str:
        source = self.experiment.model.source
        return (
            "---\nlibrary_name: transformers\ntags: [selm_jax]\n---\n\n"
            f"# {self.name}\n\nTrained from `{source}` with selm_jax: {self.updates} updates.\n"
        )

    def __repr__(self) -> str:
        mesh = self._devices.mesh
        return (
            f"{self.name}: {self._programs.parameters:,} parameters on {mesh.size} "
            f"{mesh.devices.flat[0].platform} devices, {self.updates} updates"
        )

    # Only for pairs and trainers, not for the rest of the package or for users

    @property
    def tokenizer(self) -> str:
        """The digest of the tokenizer, which shows whether token ids belong to this model."""
        return self._start.chat.tokenizer.digest()

    def _check_tokenizer(self, digest: str) -> None:
        """Raises ApiError if `digest` is not that of this model's tokenizer."""
        if digest != self.tokenizer:
            raise ApiError(
                "these answers were tokenised with another model's tokenizer, not with that of "
                f"{self.name}. Use them with the model that wrote them, or generate answers with "
                "this one"
            )

    def _programs_of(
        self, task: Task, training: Settings, longest: int, batches: BatchSizes | None
    ) -> Programs:
        """The programs that a run would use to train this model with these settings and sizes."""
        e = config.as_dict(self.experiment)
        training = e["training"] | training
        groups = {key: e[key] for key in ("model", "lora", "compute", "text", "rollout")}
        experiment = _experiment("selm.Trainer", **groups, training=training)
        return Programs(
            experiment, task, self._start.facts, Sizes(0, longest), self._policy.stop_ids,
            self._devices, batches,
        )  # fmt: skip

    @property
    def _base(self) -> Params:
        """The frozen parameters under the adapters, or all parameters if there are no adapters."""
        if self._programs.lora is None:
            return self._trained
        if self._kept_base is None:
            self._kept_base = self._programs.start_of(self._start.folder.path)
        return self._kept_base

    @property
    def _trained(self) -> Params:
        """The parameters that updates change: the adapters, or all parameters without adapters."""
        if self._programs.lora is None:
            return self._policy.weights.to_score()
        if self._adapters is None:
            self._adapters = self._programs.trained(
                self._base, iteration_key(self.experiment.seed, 1)
            )
        return self._adapters

    def _become(self, trained: Params) -> None:
        """Replaces the trained parameters with `trained`, the result of an update."""
        self.updates += 1
        if self._programs.lora is None:
            self._policy.weights.hold(trained)
        else:
            self._adapters = trained
            self._policy.weights.forget()

    def _fixed(self, programs: Programs) -> dict[str, Any]:
        """The inputs that stay constant in all updates; see `Programs.fixed`."""
        folder = self._start.folder.path
        base = self._base if programs.lora is not None else {}
        key = iteration_key(programs.experiment.seed, 1)
        return programs.fixed(base, key, folder, folder)

    def _read(self) -> Params:
        lora = self._programs.lora
        if lora is None:
            return self._programs.load(self._start.folder.path)
        merged: Callable[[Params, Params], Params] = jax.jit(
            lambda base, adapters: merge(dequantize(base), adapters, lora)
        )
        return merged(self._base, self._trained)
