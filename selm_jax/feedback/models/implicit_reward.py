"""A ranker that asks the policy itself: DPO's implicit reward, with a penalty on length.

    score = beta (log policy(y | x) - log reference(y | x)) - length_penalty |y|

DICE (arXiv 2406.09760): a policy that DPO has trained against a reference is a reward model, which
can rank that policy's own answers. |y| is the answer's length in characters, as in the authors'
code (https://github.com/sail-sg/dice). They choose the penalty so that chosen and rejected answers
have equal lengths on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from selm_jax.config import Text
from selm_jax.feedback.models.settings import checked_dtype
from selm_jax.feedback.ranker import FeedbackError, Question, check_questions, check_scores
from selm_jax.models.decoder import abstract_params
from selm_jax.models.families import read_config
from selm_jax.parallel.alone import own_devices
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.policy.policy import Policy
from selm_jax.preferences.examples import Example, Ids
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.ranges import NonNegative, Positive
from selm_jax.text.chat import Chat, UnusableAnswer
from selm_jax.weights.huggingface import load
from selm_jax.weights.sources import resolve


def implicit_rewards(
    policy: ArrayLike,
    reference: ArrayLike,
    lengths: ArrayLike,
    beta: float,
    length_penalty: float,
) -> Float64[np.ndarray, " candidates"]:
    """The scores of a prompt's candidates from their log-probabilities, in nats, and lengths.

    All are [candidates].

    >>> implicit_rewards([-10.0, -20.0], [-12.0, -21.0], [30, 10], 0.1, 0.01).round(3).tolist()
    [-0.1, 0.0]
    """
    difference = np.asarray(policy, np.float64) - np.asarray(reference, np.float64)
    return beta * difference - length_penalty * np.asarray(lengths, np.float64)


@dataclasses.dataclass(frozen=True)
class ImplicitReward:
    """A ranker that scores answers with two language models (see `ranker.Ranker`).

    Attributes:
        policy: the folder of the policy; None until `for_policy` says which.
        reference: the folder of the model that the policy was trained against.
        text: how texts become token ids.
    """

    policy: Path | None
    reference: Path
    beta: float
    length_penalty: float
    text: Text
    dtype: Any
    name: str = "implicit_reward"

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.reference,) if self.policy is None else (self.policy, self.reference)

    def for_policy(self, policy: Path, reference: Path | None) -> ImplicitReward:
        """The ranker of an iteration; the same if the settings name a policy.

        Args:
            reference: the model that `policy` was trained against; None if it is the run's start
                model, whose reference is in the settings.
        """
        if self.policy is not None:
            return self
        return dataclasses.replace(self, policy=policy, reference=reference or self.reference)

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Scores the candidates: one float64 array `[candidates]` per question.

        The two models are read one after the other, and freed afterwards.

        Raises:
            FeedbackError: no policy is known, the models have different vocabularies, questions and
                candidates do not match, or a score is not finite.
            PolicyError: a prompt with an answer is longer than the model's context.
        """
        check_questions(self.name, questions, candidates)
        if self.policy is None:
            raise FeedbackError(
                f"ranker {self.name!r}: outside of a run there is no policy. Name a model folder "
                "or Hub id in the setting `policy`."
            )
        policy, reference = (_opened(each, self.text, self.dtype) for each in self.folders)
        if policy.config.vocab_size != reference.config.vocab_size:
            raise FeedbackError(
                f"ranker {self.name!r}: {self.folders[0]} has a vocabulary of "
                f"{policy.config.vocab_size:,} tokens and {self.folders[1]} one of "
                f"{reference.config.vocab_size:,}. Name the reference that it was trained against."
            )
        ids = [
            [_answer_ids(policy.chat, question, text) for text in texts]
            for question, texts in zip(questions, candidates, strict=True)
        ]
        examples = [
            Example(question.id, policy.chat.prompt_ids(question.messages), _different(each), {})
            for question, each in zip(questions, ids, strict=True)
        ]
        scored = [i for i, example in enumerate(examples) if example.responses]
        logps = []
        for model in (policy, reference):
            logps.append(model.logps([examples[i] for i in scored]) if scored else [])
            model.weights.forget()
        found = [np.zeros(0) for _ in examples]
        for i, of_policy, of_reference in zip(scored, *logps, strict=True):
            at = [examples[i].responses.index(each) for each in ids[i]]
            found[i] = implicit_rewards(
                np.array(of_policy)[at], np.array(of_reference)[at], list(map(len, candidates[i])),
                self.beta, self.length_penalty,
            )  # fmt: skip
        return check_scores(self.name, questions, candidates, found)


def _opened(folder: Path, text: Text, dtype: Any) -> Policy:
    """A model on all devices of this process, whose weights are read when it first scores."""
    folder = mirrors.need(folder)
    config, mesh = read_config(folder), make_mesh((1, -1, 1), own_devices())
    where = shardings(abstract_params(config), mesh, TRAINING)
    chat = Chat(folder, text, config.vocab_size)
    return Policy(
        str(folder), lambda: load(folder, config, dtype=dtype, shardings=where), config,
        chat=lambda: chat, stop_ids=lambda: chat.stop_ids, mesh=mesh, decode_mesh=mesh, dtype=dtype,
    )  # fmt: skip


def _answer_ids(chat: Chat, question: Question, text: str) -> Ids:
    """The token ids of an answer with its end token.

    What the template cannot hold, such as an empty answer, is tokenised by itself: policies give
    such answers, and one of them must not end a run.
    """
    try:
        return chat.response_ids(question.messages, text)
    except UnusableAnswer:
        return (*chat.tokens(text), chat.stop_ids[0])


def _different(responses: Sequence[Ids]) -> tuple[Ids, ...]:
    return tuple(dict.fromkeys(responses))


def implicit_reward(
    reference: str,
    policy: str | None = None,
    beta: Positive = 0.1,
    length_penalty: NonNegative = 0.0,
    template: Mapping[str, Any] | None = None,
    dtype: str = "auto",
) -> ImplicitReward:
    """Opens the reference, and the policy if it is named.

    Args:
        reference: folder or Hub id of the model that the run's start model was trained against by
            DPO. From the second iteration on, the reference is the run's own.
        policy: folder or Hub id of a policy that ranks in all iterations, against `reference`. None
            is the policy of the iteration, which ranks its own answers.
        beta: factor of the log-ratio, that of the DPO training.
        length_penalty: what each character of an answer costs.
        template: variables of the chat template, such as `{enable_thinking: false}`.
        dtype: dtype of parameters and activations: `auto` (bfloat16, but float32 on CPU), `float32`
            or `bfloat16`.

    Raises:
        FeedbackError: a setting is unknown.
        SourceError: there is no such folder or Hub id.
        UnsupportedModel: config.json describes an unknown model.
    """
    kind = checked_dtype("implicit_reward", dtype, jax.default_backend() == "cpu")
    of_reference, of_policy = (
        None if source is None else resolve(source).path for source in (reference, policy)
    )
    assert of_reference is not None
    for folder in filter(None, (of_reference, of_policy)):
        if read_config(folder).head is not None:
            raise FeedbackError(
                f"ranker 'implicit_reward': {folder} is a reward model, which gives texts no "
                "probability. Name a language model, or use the ranker reward_model."
            )
    text = Text(template=dict(template or {}))
    return ImplicitReward(of_policy, of_reference, beta, length_penalty, text, kind)
