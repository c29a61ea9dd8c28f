"""Checks before a run starts that the data's own answers fit the model and a packed row.

An answer that does not fit stops training. All rows are therefore laid out once at the start, so
that this does not happen after days of generating and ranking.
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
    """The layout and the length limits that a run applies to the data set's own answers.

    Attributes:
      chat: the chat template and tokenizer.
      text: the run's settings `text`.
      sources: which of `chosen` and `rejected` are used.
      head: a reward model's head, which reads whole conversations; None for a language model.
      positions: the most tokens that the model can read: a prompt with one answer.
      row: tokens of a packed row, which contains a prompt with all its answers; None if rows are
        fitted to the examples.
    """

    chat: Chat
    text: Text
    sources: tuple[str, ...]
    head: ScalarHead | None
    positions: int
    row: int | None

    def example(self, prompt: Prompt) -> Example | None:
        """Makes an example from a prompt and its answers in the data; None without answers.

        Raises:
          UnusableAnswer: if an answer cannot follow the prompt.
          ExampleError: if a reward model could not tell the answers apart.
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
        """Says why the prompt's answers in the data do not fit; None if they fit or are missing.

        Raises:
          UnusableAnswer, ExampleError: as for `example`.
        """
        example = self.example(prompt)
        if example is None:
            return None
        longest = len(example.prompt) + max(map(len, example.responses))
        if longest > self.positions:
            return (
                f"with its longest answer in the data it has {longest} tokens; the model was made "
                f"for at most {self.positions} (max_position_embeddings)"
            )
        if self.row is not None and example.tokens > self.row:
            return (
                f"with its answers in the data it takes {example.tokens} tokens; a row has "
                f"{self.row} (training.row_length)"
            )
        return None

    def fits(self, prompt: Prompt) -> bool:
        """Says whether the prompt's answers fit; also True if they are unusable in another way."""
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
    """Makes a reward model's training example from the whole conversations of a pair.

    Args:
      chat: the chat template and tokenizer.
      head: the reward model's head.
      prompt: the prompt of the pair.
      texts: the answers by role.
      scores: the answers' scores in the data by role. If only one has a score, the other gets 0.

    Raises:
      ExampleError: if both conversations have the same tokens.
    """
    whole = [head.read(chat.conversation_ids(prompt.messages, text)) for text in texts.values()]
    if len(set(whole)) < len(whole):
        raise ExampleError(
            f"prompt {prompt.id}: {' and '.join(texts)} become the same {len(whole[0])} tokens, so "
            "that the model cannot prefer one of them. Remove the row"
        )
    before, rests = split(whole)
    given = None
    if any(score is not None for score in scores.values()):
        given = tuple(scores[role] or 0.0 for role in texts)
    roles = {role: i for i, role in enumerate(texts)}
    return Example(prompt.id, before, tuple(rests), roles, scores=given)
