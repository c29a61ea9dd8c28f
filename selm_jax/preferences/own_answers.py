"""The data set's own answers as what would be trained on: known before anything is computed.

An answer that does not fit the model or a packed row stops training. So that it does not do so after
days of generating and ranking, all rows are laid out once at the start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from selm_jax.config import Text
from selm_jax.models.config import ScalarHead
from selm_jax.preferences.examples import Example, ExampleError
from selm_jax.preferences.rewards import split
from selm_jax.text.answers import answer_ids, answers, check_spelled
from selm_jax.text.chat import Chat, UnusableAnswer
from selm_jax.text.layout import paper_row
from selm_jax.text.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class OwnAnswers:
    """How a run lays out the data's answers, and the room that they have.

    Attributes:
      sources: which of `chosen` and `rejected` are used.
      head: of a reward model, which reads whole conversations; None of a language model.
      positions: tokens that the model was made for, of a prompt with one answer.
      row: tokens of a packed row, which holds a prompt with all answers.
    """

    chat: Chat
    text: Text
    sources: tuple[str, ...]
    head: ScalarHead | None
    positions: int
    row: int

    def example(self, prompt: Prompt) -> Example | None:
        """The prompt with all its own answers; None if it has none.

        Raises:
          UnusableAnswer: an answer cannot follow the prompt.
          ExampleError: a reward model could not tell the answers apart.
        """
        texts = {name: text for name, text in answers(prompt).items() if name in self.sources}
        if not texts:
            return None
        if self.head is not None:
            for source in texts:
                check_spelled(self.chat, prompt, source)
            return rated_example(self.chat, self.head, prompt, texts, {})
        if self.text.layout == "paper":
            length = self.text.max_length, self.text.max_prompt_length
            row = paper_row(self.chat, prompt.messages, texts, *length)
            return Example.of(prompt.id, row.prompt, row.responses)
        responses = {source: answer_ids(self.chat, prompt, source) for source in texts}
        return Example.of(prompt.id, self.chat.prompt_ids(prompt.messages), responses)

    def misfit(self, prompt: Prompt) -> str | None:
        """Why the prompt's own answers do not fit, in words; None if they do, or if there are none.

        Raises:
          UnusableAnswer, ExampleError: as `example`.
        """
        example = self.example(prompt)
        if example is None:
            return None
        longest = len(example.prompt) + max(map(len, example.responses))
        if longest > self.positions:
            return (
                f"with its longest answer in the data it has {longest} tokens; the model was made "
                f"for {self.positions} (max_position_embeddings)"
            )
        if example.tokens > self.row:
            return (
                f"with its answers in the data it takes {example.tokens} tokens of a row, which has "
                f"{self.row} (training.row_length)"
            )
        return None

    def fits(self, prompt: Prompt) -> bool:
        """Whether its answers fit. One that cannot be used is another matter, which is told apart."""
        try:
            return self.misfit(prompt) is None
        except UnusableAnswer:
            return True


def rated_example(
    chat: Chat,
    head: ScalarHead,
    prompt: Prompt,
    texts: Mapping[str, str],
    scores: Mapping[str, float | None],
) -> Example:
    """What a reward model is trained on: the conversations of a pair, whole.

    Args:
      texts: of the answers, by role.
      scores: what the data says of them; None is 0 where it says something of the other.

    Raises:
      ExampleError: both conversations are the same tokens.
    """
    whole = [head.read(chat.conversation_ids(prompt.messages, text)) for text in texts.values()]
    if len(set(whole)) < len(whole):
        raise ExampleError(
            f"prompt {prompt.id}: {' and '.join(texts)} are the same {len(whole[0])} tokens to the "
            "model, so that nothing is preferred. Remove the row"
        )
    before, rests = split(whole)
    given = None
    if any(score is not None for score in scores.values()):
        given = tuple(scores[role] or 0.0 for role in texts)
    roles = {role: i for i, role in enumerate(texts)}
    return Example(prompt.id, before, tuple(rests), roles, scores=given)
