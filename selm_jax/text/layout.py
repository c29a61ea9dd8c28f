"""Tokenises prompts and responses like the authors' code (`text.layout: paper`).

It differs from the default (`text.chat`) in three ways; the files named here are in the code
published with arXiv 2405.19332:

- The prompt is rendered without the header of the answer, and each response is the template applied
  to the answer alone: header and end text are scored (src/alignment/data.py:82-91).
- BOS is put before every prompt and EOS after every response, even if the template wrote them
  already (scripts/selm_trainer.py:196-215). With Llama 3 both occur twice, and every response
  begins with one more BOS. An answer that was cut off is ended as if it had ended by itself.
- Texts are cut by a rule that looks at the chosen and the rejected response (:217-234): `truncate`.

All responses are rendered from text, so the policy's may have other ids than were sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from selm_jax.text.chat import Chat, ChatError, Message, Turn

Ids = tuple[int, ...]


class PaperRow(NamedTuple):
    """The token ids of a prompt and of its responses, by role, as used in training."""

    prompt: Ids
    responses: dict[str, Ids]
    prompt_cut: bool
    responses_cut: bool


def paper_row(
    chat: Chat,
    messages: Sequence[Turn],
    texts: Mapping[str, str],
    max_length: int,
    max_prompt_length: int,
) -> PaperRow:
    """Tokenises and truncates a prompt and its responses as the authors' code does.

    Args:
      chat: the chat template and tokenizer.
      messages: the conversation up to the last user turn.
      texts: role -> the response's text; the roles must include `chosen` and `rejected`.
      max_length, max_prompt_length: see `truncate`.

    Raises:
      ChatError: if the tokenizer has no BOS or EOS, or the template refuses an answer alone.
    """
    rendered = {role: paper_ids(chat, messages, text) for role, text in texts.items()}
    prompts = {prompt for prompt, _ in rendered.values()}
    if len(prompts) > 1:
        raise ChatError(
            "text.layout: paper: a token spans the end of the prompt for some responses but not "
            f"for others, so their prompts differ: {list(prompts)}. Use text.layout: default"
        )
    responses = {role: ids for role, (_, ids) in rendered.items()}
    return truncate(prompts.pop(), responses, max_length, max_prompt_length)


def paper_ids(chat: Chat, messages: Sequence[Turn], text: str) -> tuple[Ids, Ids]:
    """The token ids of the prompt and of one response, before `truncate` cuts them."""
    bos, eos = chat.tokenizer.bos_token_id, chat.tokenizer.eos_token_id
    if bos is None or eos is None:
        raise ChatError(
            f"text.layout: paper puts BOS and EOS around every text, but the tokenizer of "
            f"{chat.folder} has no {'BOS' if bos is None else 'EOS'}. Use text.layout: default"
        )
    answer = [Message("assistant", text)]
    before = chat.rendered_ids(messages)
    try:
        both = chat.rendered_ids(messages, answer)
    except ChatError as e:
        raise ChatError(
            "text.layout: paper renders an answer alone, like the authors' code, but this model's "
            f"template does not allow that. Use text.layout: default. ({e})"
        ) from e
    start = len(before)
    if both[:start] != before:  # the prompt's last token was merged with the text that follows
        start -= 1
    return (bos, *both[:start]), (*both[start:], eos)


def truncate(
    prompt: Ids, responses: Mapping[str, Ids], max_length: int, max_prompt_length: int
) -> PaperRow:
    """Cuts prompt and responses by the authors' rule (selm_trainer.py:217-234, `keep_end`).

    The longer of `chosen` and `rejected` decides. If the prompt with it has more than `max_length`
    tokens, the prompt keeps its last `max_prompt_length`, and so may lose BOS and header. If it is
    still too long, every response keeps its first `max_length - max_prompt_length`, and so loses
    its end. With the paper's 1024 and 512, and a prompt of 100 tokens, a response of 924 tokens
    stays whole and one of 925 keeps 512. Other roles are cut too but do not decide: an explore
    response may be longer than `max_length`.
    """
    longer = max(len(responses["chosen"]), len(responses["rejected"]))
    kept = prompt
    if len(kept) + longer > max_length:
        kept = prompt[-max_prompt_length:]
    cut = len(kept) + longer > max_length
    end = max_length - max_prompt_length if cut else None
    return PaperRow(
        prompt=kept,
        responses={role: ids[:end] for role, ids in responses.items()},
        prompt_cut=len(kept) < len(prompt),
        responses_cut=cut,
    )
