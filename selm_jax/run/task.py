"""The two kinds of training on preference pairs: of a language model or of a reward model.

The loss decides which kind an experiment is. Everything that differs is in the `Task`.

                            LanguageModel                        RewardModel
    an example              a prompt and its answers             both whole conversations of a pair
    held-out evaluation     its own answers to prompts           the data's pairs
    checked first           the template, the longest prompt     whether the data has pairs
    lengths that matter     prompts and the answers to them      conversations of the data
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from selm_jax.config import Experiment, Text, most_in_row, objective_at
from selm_jax.models.config import DecoderConfig, ScalarHead
from selm_jax.models.families import read_as_reward_model
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Objective
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.examples import Example, Ids
from selm_jax.preferences.own_answers import rated_example
from selm_jax.run.rows import RunError, prompt_ids
from selm_jax.shell import artifacts
from selm_jax.shell.user_code import is_user_code
from selm_jax.tables import ranked
from selm_jax.text.answers import answer_ids, check_spelled
from selm_jax.text.chat import Chat
from selm_jax.text.layout import paper_row
from selm_jax.text.prompts import Prompt

Prompts = Sequence[Prompt]
Pad = Callable[[], int | None]
Pair = Mapping[str, ranked.Row]  # ranked answers by role


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sequence lengths that programs are built for, in tokens.

    Attributes:
      longest_prompt: the longest prompt that is answered; 0 for a reward model, which answers none.
      longest_sequence: the longest prompt with its answer. It chooses the table of rotary
        frequencies if the model has two.
    """

    longest_prompt: int
    longest_sequence: int


class Task(abc.ABC):
    """A kind of training: the model, the examples that it learns from, and its evaluation.

    Attributes:
      rates: whether a reward model is trained; manifests and `stage.json` use this name too.
      trains: the kind of model, in words.
      answers: whether the model answers prompts, in training and in the held-out evaluation.
        Otherwise it is evaluated on held-out pairs.
      pipeline: the Hub's name for the kind of model (its `pipeline_tag`).
      example_settings: the settings that an example depends on, besides those in `text`.
      reference_free: whether the objective needs no reference log-probabilities.
      start_share: the start model's share in the reference log-probabilities (INPO).
      uses_shared: whether those of the pair's shared length are needed as well (LD-DPO).
      loss: the name of the objective's loss.
      looked_at: the run folder, if the run is opened read-only; its code is then never imported.
    """

    rates: ClassVar[bool]
    trains: ClassVar[str]
    answers: ClassVar[bool]
    pipeline: ClassVar[str]
    example_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        loss: str,
        objectives: Sequence[Objective],
        reference_free: bool,
        looked_at: Path | None,
        start_share: float = 0.0,
        uses_shared: bool = False,
    ):
        self.loss, self._objectives, self.start_share = loss, objectives, start_share
        self.reference_free, self.looked_at = reference_free, looked_at
        self.uses_shared = uses_shared

    @property
    def objective(self) -> Objective:
        """The objective of iteration 1; that of another differs at most in its alpha."""
        return self.objective_at(1)

    def objective_at(self, iteration: int) -> Objective:
        """The objective of an iteration, built from its settings; the same object for equal ones.

        Raises:
          RunError: the objective is user code and the run is opened read-only.
        """
        if not self._objectives:
            raise RunError(_not_imported(self.looked_at, "objective.loss", self.loss))
        return self._objectives[min(iteration, len(self._objectives)) - 1]

    @abc.abstractmethod
    def facts(self, stored: DecoderConfig, file: Path, pad: Pad) -> DecoderConfig:
        """The configuration of the model that is trained.

        Args:
          stored: the configuration of the start model.
          file: that model's config.json.
          pad: returns the id of that model's padding token.

        Raises:
          RunError: a language model cannot start from a reward model.
        """

    def check_chat(self, chat: Chat, e: Experiment) -> None:
        """Raises ChatError if the tokenizer and chat template cannot be used."""

    def check_settings(self, e: Experiment) -> None:
        """Raises RunError if the experiment lacks something that training needs."""

    @abc.abstractmethod
    def whose_answers(self, trained: Prompts, heldout: Prompts, strict: bool) -> Prompts:
        """The prompts whose answers in the data are checked before the work begins.

        Args:
          strict: whether an answer that does not fit is an error. If not, such answers have been
            left out already.
        """

    @abc.abstractmethod
    def sizes(
        self, e: Experiment, facts: DecoderConfig, longest_prompt: int, of_data: Callable[[], int]
    ) -> Sizes:
        """The sequence lengths that a run's programs are built for.

        Args:
          longest_prompt: the length of the longest answered prompt, in tokens; 0 if there is none.
          of_data: returns the length of the longest conversation in the data, with its answer, in
            tokens.
        """

    @abc.abstractmethod
    def largest(self, e: Experiment, facts: DecoderConfig) -> Sizes:
        """The largest sizes that the settings allow, which `selm plan` assumes."""

    @abc.abstractmethod
    def candidate_ids(self, chat: Chat, prompt: Prompt, source: str) -> Ids | None:
        """The token ids of the data's answer `source`; None if the task tokenises only whole pairs.

        Raises:
          UnusableAnswer: the answer cannot be used.
        """

    @abc.abstractmethod
    def example(
        self, chat: Chat, head: ScalarHead | None, text: Text, prompt: Prompt, pair: Pair
    ) -> tuple[Example, Mapping[str, int]]:
        """Returns (the training example made from a prompt's pair, counts of shortened texts)."""

    def leaves_out_long(self, e: Experiment) -> bool:
        """Says whether an example that is too long is dropped and counted instead of an error."""
        return False

    @abc.abstractmethod
    def method(self, e: Experiment) -> str:
        """Says what the model was trained on, in words that end a sentence of the model card."""


class LanguageModel(Task):
    """Training of a language model on pairs of answers, by the model itself or from the data."""

    rates, answers = False, True
    trains, pipeline = "language model", "text-generation"

    def facts(self, stored: DecoderConfig, file: Path, pad: Pad) -> DecoderConfig:
        if stored.head is not None:
            raise RunError(
                f"{file.parent} is a reward model and cannot generate text, but objective "
                f"{self.loss} trains a language model. Name a language model as model.source; to "
                "rank with this model, set "
                "`feedback: {ranker: reward_model, settings: {source: ...}}`"
            )
        return stored

    def check_chat(self, chat: Chat, e: Experiment) -> None:
        if e.text.layout == "default" or not e.taught:
            chat.check_made_up()

    def check_settings(self, e: Experiment) -> None:
        if not self.start_share:
            return
        if e.training.reference == "live":
            raise RunError(
                f"objective {self.loss} needs two references, whose log-probabilities are stored, "
                "but training.reference: live computes one at every update. Set it to stored"
            )
        if e.training.reference_policy == "start":
            raise RunError(
                f"objective {self.loss} mixes the start model with the policy before each "
                "iteration, but training.reference_policy: start leaves only the start model. Set "
                "it to previous, or use `ipo` with length_normalized: false"
            )

    def whose_answers(self, trained: Prompts, heldout: Prompts, strict: bool) -> Prompts:
        return trained if strict else ()

    def sizes(
        self, e: Experiment, facts: DecoderConfig, longest_prompt: int, of_data: Callable[[], int]
    ) -> Sizes:
        answered = longest_prompt + e.rollout.max_new_tokens
        if facts.has_two_tables and e.candidates.dataset:
            own = e.text.max_length if e.text.layout == "paper" else of_data()
            answered = max(answered, own)
        return Sizes(longest_prompt, answered)

    def largest(self, e: Experiment, facts: DecoderConfig) -> Sizes:
        return self.sizes(e, facts, e.rollout.max_prompt_tokens, lambda: 0)

    def candidate_ids(self, chat: Chat, prompt: Prompt, source: str) -> Ids | None:
        return answer_ids(chat, prompt, source)

    def example(
        self, chat: Chat, head: ScalarHead | None, text: Text, prompt: Prompt, pair: Pair
    ) -> tuple[Example, Mapping[str, int]]:
        if text.layout == "paper":
            texts = {role: row.text for role, row in pair.items()}
            row = paper_row(chat, prompt.messages, texts, text.max_length, text.max_prompt_length)
            cut = {"prompts_cut": row.prompt_cut, "responses_cut": row.responses_cut}
            return _with_scores(Example.of(prompt.id, row.prompt, row.responses), pair), cut
        responses = {role: row.token_ids or () for role, row in pair.items()}
        example = Example.of(prompt.id, prompt_ids(chat, prompt), responses)
        return _with_scores(example, pair), {}

    def method(self, e: Experiment) -> str:
        return (
            f"answers that the ranker `{e.feedback.ranker}` scored, following Self-Exploring "
            "Language Models (https://arxiv.org/abs/2405.19332)."
        )


class RewardModel(Task):
    """Training of a reward model on pairs of conversations from the data set."""

    rates, answers = True, False
    trains, pipeline = "reward model", "text-classification"
    example_settings = ("data.on_bad_row",)

    def facts(self, stored: DecoderConfig, file: Path, pad: Pad) -> DecoderConfig:
        return stored if stored.head is not None else read_as_reward_model(file, pad())

    def check_settings(self, e: Experiment) -> None:
        if not (e.taught and e.data.rejected):
            raise RunError(
                f"objective {self.loss} trains a reward model on pairs of the data set, but the "
                "experiment does not use them. Set data.chosen and data.rejected to their columns, "
                "and set candidates: {greedy: 0, samples: 0, dataset: true}"
            )
        if e.training.token_statistics:
            raise RunError(
                f"objective {self.loss} trains a reward model, which predicts no tokens, so "
                "training.token_statistics has nothing to report. Set it to false"
            )
        if e.lora is not None:
            raise RunError(
                f"objective {self.loss} trains a reward model, but adapters would leave its head "
                "at zero. Set lora: null to train all parameters"
            )
        if e.text.layout != "default":
            raise RunError(
                f"objective {self.loss} trains a reward model on whole conversations, but "
                f"text.layout: {e.text.layout} does not produce them. Set text.layout: default"
            )

    def whose_answers(self, trained: Prompts, heldout: Prompts, strict: bool) -> Prompts:
        return [*trained, *heldout]

    def sizes(
        self, e: Experiment, facts: DecoderConfig, longest_prompt: int, of_data: Callable[[], int]
    ) -> Sizes:
        return Sizes(longest_prompt, max(1, of_data()) if facts.has_two_tables else 1)

    def largest(self, e: Experiment, facts: DecoderConfig) -> Sizes:
        longest = most_in_row(e.training.row_length, facts.max_positions)
        return self.sizes(e, facts, e.rollout.max_prompt_tokens, lambda: longest)

    def candidate_ids(self, chat: Chat, prompt: Prompt, source: str) -> Ids | None:
        check_spelled(chat, prompt, source)

    def example(
        self, chat: Chat, head: ScalarHead | None, text: Text, prompt: Prompt, pair: Pair
    ) -> tuple[Example, Mapping[str, int]]:
        assert head is not None
        texts = {role: row.text for role, row in pair.items()}
        scores = {role: None if np.isnan(row.score) else row.score for role, row in pair.items()}
        return rated_example(chat, head, prompt, texts, scores), {}

    def leaves_out_long(self, e: Experiment) -> bool:
        return e.data.on_bad_row == "drop"

    def method(self, e: Experiment) -> str:
        return (
            "pairs of the data set. It is a reward model: the score of a conversation with its "
            "answer, formatted by the chat template, is the logit of its only label."
        )


def _with_scores(example: Example, pair: Pair) -> Example:
    """The example with the ranker's score of each response; as it is if a score is missing."""
    scores = [math.nan] * len(example.responses)
    for role, i in example.roles.items():
        scores[i] = pair[role].score
    further = (row for role, row in pair.items() if role not in ROLES)
    for i, row in zip(example.explored[1:], further, strict=False):
        scores[i] = row.score
    return example if np.isnan(scores).any() else dataclasses.replace(example, scores=tuple(scores))


def task_of(settings: Mapping[str, Any], looked_at: Path | None = None) -> Task:
    """The `Task` that an experiment's objective asks for.

    Args:
      settings: the experiment's `objective`: the loss and its arguments.
      looked_at: the run folder, if the run is opened read-only. User code is then never imported;
        the run's manifest says what kind of model it trains.

    Raises:
      ObjectiveError: the loss cannot be built.
    """
    loss = settings["loss"]
    if looked_at is None or not is_user_code(loss):
        alpha = settings.get("alpha")
        count = len(alpha) if isinstance(alpha, list) else 1
        each = [objective_at(settings, t) for t in range(1, count + 1)]
        built = {str(one): _built(**one) for one in each}  # equal ones compile once
        return task_with(*(built[str(one)] for one in each), loss=loss, looked_at=looked_at)
    file = looked_at / "manifest.json"
    said = artifacts.read_sealed(file) if file.exists() else {}  # there is none before a run begins
    return (RewardModel if said.get("rates") else LanguageModel)(
        loss, (), bool(said.get("reference_free")), looked_at, said.get("start_share", 0.0),
        bool(said.get("uses_shared")),
    )  # fmt: skip


def _built(loss: str, **arguments: Any) -> Objective:
    return build_objective(loss, **arguments)


def task_with(*objectives: Objective, loss: str = "", looked_at: Path | None = None) -> Task:
    """The `Task` of an objective that has already been built, or of one for each iteration."""
    first = objectives[0]
    kind = RewardModel if first.rates else LanguageModel
    name = loss or str(first)
    return kind(
        name, objectives, first.reference_free, looked_at, first.start_share, first.uses_shared
    )


def refuse_user_code(folder: Path, key: str, name: str) -> None:
    """Raises RunError if `name`, a setting of a run that is opened read-only, is user code."""
    if is_user_code(name):
        raise RunError(_not_imported(folder, key, name))


def _not_imported(folder: Path | None, key: str, name: str) -> str:
    return (
        f"{folder}/config.yaml: {key} is {name!r}, a function of yours. This command only reads "
        "the folder and does not run such code"
    )
