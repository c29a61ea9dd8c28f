"""Turns the dataset's own answers into token ids, and finds unusable answers early."""

from __future__ import annotations

from collections.abc import Iterable

from selm_jax.text.chat import Chat, ChatError, UnusableAnswer
from selm_jax.text.layout import paper_ids
from selm_jax.text.prompts import Prompt

_MEND = "Fix the row, or set data.on_bad_row to 'drop' to leave out and count such prompts"


def answers(prompt: Prompt) -> dict[str, str]:
    """Maps `chosen` and `rejected` to their texts; an answer that the data lacks is left out."""
    both = {"chosen": prompt.chosen, "rejected": prompt.rejected}
    return {source: text for source, text in both.items() if text is not None}


def answer_ids(chat: Chat, prompt: Prompt, source: str) -> tuple[int, ...]:
    """The token ids of the `chosen` or the `rejected` answer, in the default layout.

    Raises:
      UnusableAnswer: if the answer cannot follow the prompt; the message names both.
    """
    try:
        return chat.response_ids(prompt.messages, answers(prompt)[source])
    except UnusableAnswer as e:
        raise UnusableAnswer(f"prompt {prompt.id}, {source}: {e}\n{_MEND}") from e


def check_spelled(chat: Chat, prompt: Prompt, source: str) -> None:
    """Raises UnusableAnswer if the answer's text contains an end token.

    This is the only check of an answer in a whole conversation, as a reward model reads it.
    """
    if spelled := chat.spelled_ends(answers(prompt)[source]):
        raise UnusableAnswer(
            f"prompt {prompt.id}, {source}: the answer spells out the end token "
            f"{', '.join(spelled)}.\n{_MEND}"
        )


def check_answers(
    chat: Chat, prompts: Iterable[Prompt], *, layout: str, on_bad_row: str, whole: bool = False
) -> None:
    """Checks prompts and answers quickly for problems that would stop a later stage.

    The layout is tried with one prompt of each sequence of roles, because an unsuitable template
    usually fails for all prompts with that sequence. Unless bad rows are dropped, every answer is
    searched for end tokens.

    Args:
      chat: the chat template and tokenizer.
      prompts: the prompts to check.
      layout, on_bad_row: the settings `text.layout` and `data.on_bad_row`.
      whole: whether a reward model reads prompt and answer as one conversation.

    Raises:
      ChatError: if the template is unsuitable, or an answer spells out an end token. The message
        names the prompt.
    """
    tried: set[tuple[str, ...]] = set()
    for prompt in prompts:
        roles = tuple(message.role for message in prompt.messages)
        if roles not in tried:
            tried.add(roles)
            try:
                if whole:
                    chat.conversation_ids(prompt.messages, "Yes.")
                elif layout == "paper":
                    paper_ids(chat, prompt.messages, "Yes.")
                else:
                    chat.response_ids(prompt.messages, "Yes.")
            except ChatError as e:
                raise ChatError(f"prompt {prompt.id}, with the answer 'Yes.': {e}") from e
        if layout == "default" and on_bad_row == "error":
            for source, text in answers(prompt).items():
                if chat.spelled_ends(text):
                    (check_spelled if whole else answer_ids)(chat, prompt, source)


def longest_answered(chat: Chat, prompts: Iterable[Prompt], whole: bool = False) -> int:
    """The most tokens in a prompt with its dataset answer; 0 if there are no answers.

    Unusable answers are not counted: they are dropped, or stop the run elsewhere.
    """
    longest = 0
    for prompt in prompts:
        before = 0 if whole else len(chat.prompt_ids(prompt.messages))
        for text in answers(prompt).values():
            if chat.spelled_ends(text):
                continue
            if whole:
                longest = max(longest, len(chat.conversation_ids(prompt.messages, text)))
            else:
                longest = max(longest, before + len(chat.response_ids(prompt.messages, text)))
    return longest
