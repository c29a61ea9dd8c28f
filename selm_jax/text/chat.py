"""Turns conversations into token ids, and checks the boundary between prompt and response.

The layout: the prompt is the rendered conversation with the header of the answer; a response is the
answer and exactly one end token. If the model has a BOS token, it is at the beginning of the prompt
once: if the template does not write it, it is added, as the tokenizer itself would. (A template
that opens every user turn with BOS, like Llama 2's, keeps those.) Generated responses do not pass
through this module: training uses the ids that were sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

from selm_jax.config import Text
from selm_jax.text.spelled import Literal, Spelled, control_tokens
from selm_jax.text.template import Refused, Template
from selm_jax.text.tokenizer import ChatError, Tokenizer, find_chat_template
from selm_jax.text.vocabulary import checked_vocabulary, stop_ids


class UnusableAnswer(ChatError):
    """An answer cannot be used with its prompt; other answers may be usable."""


class Turn(Protocol):
    """A message of a conversation."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class Chat:
    """The tokenizer and chat template of a model folder.

    Args:
      folder: a Hugging Face folder.
      settings: `template` and `date` are passed to the template in addition to the messages;
        `special_tokens` says how to treat control tokens that a message spells out.
      vocabulary: rows of the model's embedding; None skips the checks that need it.

    Attributes:
      stop_ids: tokens that end a response, from the generation config and the tokenizer.
      spelled: finds control tokens in texts.

    Raises:
      ChatError: if the folder has no tokenizer, chat template or end token, a file cannot be read,
        the tokenizer has more ordinary tokens than the embedding has rows, or the template does
        not read a variable of `settings.template`.
    """

    def __init__(
        self,
        folder: Path,
        settings: Text = Text(),  # noqa: B008 (it is frozen)
        vocabulary: int | None = None,
    ):
        self.folder = folder = Path(folder)
        self.tokenizer = Tokenizer(folder)
        self._vocabulary = checked_vocabulary(self.tokenizer, vocabulary)
        found = find_chat_template(folder)
        if found is None:
            raise ChatError(
                f"{folder}: the tokenizer has no chat template. Use an instruction-tuned model, or "
                "save a template there as chat_template.jinja"
            )
        where, source = found
        _check_variables(folder, self.tokenizer, source, settings.template)
        variables = self.tokenizer.special | settings.template
        self._template = Template(source, where, variables, settings.date)
        self.stop_ids = stop_ids(folder, self.tokenizer, vocabulary)
        self._stop_texts = [self.tokenizer.decode([i]) for i in self.stop_ids]
        self.spelled = Spelled(control_tokens(self.tokenizer, self.stop_ids))
        as_text = settings.special_tokens == "as_text"
        self._literal = Literal(self.tokenizer, self.spelled) if as_text else None
        own = self.tokenizer.encode("")  # the special tokens that the tokenizer adds to any text
        self._bos: int | None = own[0] if own[:1] == [self.tokenizer.bos_token_id] else None
        self._opened = lru_cache(32)(self._open)  # the answers to a prompt come one after another

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the tokenizer, special tokens, template and stop tokens."""
        said = [self.tokenizer.digest(), self._template.source, self.stop_ids]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def prompt_ids(self, messages: Sequence[Turn]) -> tuple[int, ...]:
        """The token ids of the conversation, ending with the header that opens the answer.

        Raises:
          ChatError: if the template refuses the conversation, omits its system message, or writes
            BOS twice.
        """
        _, ids = self._opened(tuple((m.role, m.content) for m in messages))
        if not ids:
            raise ChatError(
                f"the chat template of {self.folder} renders the conversation {list(messages)!r} "
                "as an empty text. Fix the template, or leave out the prompt"
            )
        return ids

    def response_ids(self, messages: Sequence[Turn], text: str) -> tuple[int, ...]:
        """The token ids of the answer after `prompt_ids`, including the end token.

        Raises:
          UnusableAnswer: if the answer is empty or spells out an end token, or if the template does
            not render the prompt as a prefix of the conversation (the message shows both), puts
            more in front of the answer, or does not end it with a stop token.
          ChatError: if the template refuses the conversation.
        """
        if not text.strip():
            raise UnusableAnswer("the answer is empty, so it cannot be scored")
        if spelled := self.spelled_ends(text):
            raise UnusableAnswer(
                f"the answer spells out the end token {', '.join(spelled)}: {text!r}"
            )
        answered = [*messages, Message("assistant", text)]
        prompt, before = self._opened(tuple((m.role, m.content) for m in messages))
        full = self._marked(answered, answer_follows=False)
        both = f"prompt:       {self._plain(prompt)!r}\nconversation: {self._plain(full)!r}"
        if not full.startswith(prompt):
            raise UnusableAnswer(
                f"the chat template does not keep the prompt when the answer is added.\n{both}\n"
                f"{_THINKING}"
            )
        answer = full[len(prompt) :]
        if not _squeezed(answer).startswith(_squeezed(self._mark(text))):
            raise UnusableAnswer(
                f"the chat template changes the answer, or puts more in front of it.\n{both}\n"
                f"{_THINKING}"
            )
        ids = self._ids(answered, full)
        if ids[: len(before)] == before:
            ids = ids[len(before) :]
        else:
            # A token spans the boundary, so the policy could never sample it after this prompt:
            # tokenize prompt and answer separately.
            ids = self._within(answer)
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None:
            raise UnusableAnswer(self._endless(full))
        return ids[: end + 1]

    def conversation_ids(self, messages: Sequence[Turn], text: str) -> tuple[int, ...]:
        """The token ids of a conversation and its answer, as a reward model reads them.

        Everything that the template writes is included, also what follows the answer's end token
        (most often a line break). The answer is not checked and may be empty.

        Raises:
          ChatError: as for `prompt_ids`.
        """
        answered = [*messages, Message("assistant", text)]
        rendered = self._marked(answered, answer_follows=False)
        self._check_system(answered, rendered, answer_follows=False)  # some omit it only here
        return self._ids(answered, rendered)

    def spelled_ends(self, text: str) -> list[str]:
        """Finds end tokens written out in a text; none if `special_tokens` is `as_text`."""
        if self._literal is not None:
            return []
        if not any(end in text for end in self._stop_texts):  # the usual case, and much faster
            return []
        return self._names(i for i in self.tokens(text) if i in self.stop_ids)

    def text(self, ids: Sequence[int]) -> str:
        """Decodes ids for people and rankers: drops special tokens and outer white space."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def render(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        """Renders a conversation with the template, with or without the header of an answer.

        Raises:
          ChatError: if the template refuses the conversation or omits its system message.
        """
        return self._plain(self._marked(messages, answer_follows))

    def rendered_ids(self, messages: Sequence[Turn], *more: Sequence[Turn]) -> tuple[int, ...]:
        """The token ids of conversations rendered one after another, without answer headers.

        BOS is not added: the ids contain it only if the template writes it.
        """
        return self._tokens("".join(self._marked(each, False) for each in (messages, *more)))

    def continued(self, messages: Sequence[Turn]) -> str:
        """Renders the conversation without the end of its last message, for a model to continue.

        Raises:
          ChatError: if the template refuses the conversation or changes the last message.
        """
        *before, last = messages
        opened = [*before, Message(last.role, last.content + _HERE)]
        try:
            rendered = self._rendered(opened, False)
        except Refused as e:
            raise ChatError(self._refusal(messages, False, e)) from e
        text, here, _ = rendered.rpartition(_HERE.rstrip())
        if not here or last.content.strip() not in text:
            raise ChatError(
                f"the chat template of {self.folder} changes the last message, so that a model "
                f"cannot continue it: {rendered!r}. Use another model or template"
            )
        trimmed = not rendered[len(text) :].startswith(_HERE)  # transformers then strips it too
        return self._plain(text.rstrip() if trimmed else text)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Encodes a text without adding special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def check_made_up(self) -> None:
        """Checks the chat template with a made-up question and answer.

        A prompt must end with the header that an answer follows, and an answer must end with a stop
        token; otherwise the policy would continue with turns that it makes up itself.

        Raises:
          ChatError: if this is not the case.
        """
        question, answer = [Message("user", "Is it?")], "Yes."
        prompt = self._marked(question, answer_follows=True)
        full = self._marked([*question, Message("assistant", answer)], answer_follows=False)
        before, found, behind = full.rpartition(answer)
        if not found:
            raise ChatError(
                f"the chat template of {self.folder} omits the answer: {full!r}. Fix the template"
            )
        opens = prompt != self._marked(question, answer_follows=False)  # there is a header
        if not opens and (not full.startswith(prompt) or before[len(prompt) :].strip()):
            raise ChatError(
                f"the chat template of {self.folder} does not begin an answer: it writes "
                f"{before[len(prompt) :]!r} before an answer, but not when asked to begin one "
                f"(add_generation_prompt).\nprompt:       {prompt!r}\nconversation: {full!r}\n"
                "Add this header to the template, after `{% if add_generation_prompt %}`"
            )
        if not set(self._within(answer + behind)) & set(self.stop_ids):
            raise ChatError(self._endless(full))

    def _open(self, said: tuple[tuple[str, str], ...]) -> tuple[str, tuple[int, ...]]:
        """Renders (role, content) pairs with the header of an answer; returns (text, ids)."""
        messages = [Message(*each) for each in said]
        prompt = self._marked(messages, answer_follows=True)
        return prompt, self._ids(messages, prompt)

    def _rendered(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        """The template's output, with stand-ins for control tokens in the messages' texts."""
        said = [{"role": m.role, "content": self._mark(m.content)} for m in messages]
        return self._template.render(said, answer_follows)

    def _marked(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        """Renders like `_rendered`; raises ChatError if the template refuses or drops a message."""
        try:
            rendered = self._rendered(messages, answer_follows)
        except Refused as e:
            raise ChatError(self._refusal(messages, answer_follows, e)) from e
        if messages[-1].role == "user":
            self._check_system(messages, rendered, answer_follows)
        return rendered

    def _mark(self, text: str) -> str:
        return text if self._literal is None else self._literal.marked(text)

    def _plain(self, marked: str) -> str:
        return marked if self._literal is None else self._literal.plain(marked)

    def _check_system(self, messages: Sequence[Turn], rendered: str, answer_follows: bool) -> None:
        """Raises ChatError if the rendered conversation lacks a system message."""
        for i, message in enumerate(messages):
            if message.role == "system" and (content := message.content.strip()):
                rest = [*messages[:i], *messages[i + 1 :]]
                there = self._mark(content) in rendered
                if not there and rendered == self._try(rest, answer_follows):
                    raise ChatError(
                        f"the chat template of {self.folder} omits the system message {content!r}. "
                        "Put its text into the user's turn instead. System messages come from the "
                        "conversation, data.system or data.system_column"
                    )

    def _try(self, messages: Sequence[Turn], answer_follows: bool) -> str | None:
        """The rendered conversation; None if the template refuses it."""
        try:
            return self._rendered(messages, answer_follows)
        except Refused:
            return None

    def _refusal(self, messages: Sequence[Turn], answer_follows: bool, error: Exception) -> str:
        roles = ", ".join(m.role for m in messages)
        reason = str(error).rstrip(".")
        said = f"the chat template of {self.folder} refuses a conversation of {roles}: {reason}. "
        others = [m for m in messages if m.role != "system"]
        if len(others) < len(messages) and self._try(others, answer_follows):
            return said + (
                "It accepts the conversation without the system message: remove data.system (and "
                "set data.system_column to null if a column has system messages), "
                "or put its text into the user's turn"
            )
        return said + "Use an order of turns that it accepts (mostly user, assistant, user)"

    def _endless(self, full: str) -> str:
        return (
            "the chat template does not end an answer with one of the stop tokens "
            f"{self._names(self.stop_ids)}: {self._plain(full)!r}. If it ends with another token, "
            "add that token's id to eos_token_id in "
            f"{self.folder / 'generation_config.json'}"
        )

    def _ids(self, messages: Sequence[Turn], rendered: str) -> tuple[int, ...]:
        """Encodes a rendered conversation so that it begins with one BOS, if the model has BOS."""
        ids, bos = self._tokens(rendered), self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            raise ChatError(
                f"the chat template of {self.folder} writes {self.tokenizer.bos_token} twice: "
                f"{rendered!r}. Remove one of them from the template (or from the message)"
            )
        if self._bos is None or ids[:1] == (bos,):
            return ids
        # The template may write BOS after other text; a BOS that a message spells does not count.
        text = self.tokenizer.bos_token or ""
        spelled = sum(self._mark(m.content).count(text) for m in messages)
        return ids if rendered.count(text) > spelled else (self._bos, *ids)

    def _tokens(self, marked: str) -> tuple[int, ...]:
        """Encodes a rendered text; raises ChatError if the embedding has no row for a token."""
        ids = self.tokens(marked) if self._literal is None else tuple(self._literal.encode(marked))
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            raise ChatError(
                f"the text {self._plain(marked)!r} has the token {self._names([max(ids)])[0]!r} "
                f"with id {max(ids)}, but the model's embedding has only {self._vocabulary} rows. "
                "Remove the token from the text, or use a model whose embedding has it"
            )
        return ids

    def _within(self, marked: str) -> tuple[int, ...]:
        """Encodes a text that continues another, so that the tokenizer adds no space before it."""
        anchor = self.tokenizer.eos_token or self._names(self.stop_ids)[0]
        return self._tokens(anchor + marked)[1:]

    def _names(self, ids) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(list(ids))


# Marks the end of a message that is left open; the space shows whether the template trims texts.
_HERE = "\ue000here "
_THINKING = (
    "The answer must begin directly after the prompt. For a thinking model, setting "
    "`text.template: {enable_thinking: false}` usually achieves this"
)


class Message:
    """A message with the given role and content."""

    def __init__(self, role: str, content: str):
        self.role, self.content = role, content


def _squeezed(text: str) -> str:
    """Removes all white space, because templates trim answers and some add a space."""
    return "".join(text.split())


# Variables of a template that this package sets; special tokens come from the tokenizer.
_OURS = {"messages", "add_generation_prompt", "tools", "documents", "strftime_now", "today"}


def _check_variables(
    folder: Path, tokenizer: Tokenizer, template: str, variables: Mapping[str, object]
) -> None:
    for name in variables:
        if name in _OURS or name in tokenizer.special:
            raise ChatError(
                f"text.template cannot set {name!r}, which this program sets. Remove this variable"
            )
        if name not in template:
            raise ChatError(
                f"text.template sets {name!r}, but the chat template of {folder} never reads it. "
                "Correct or remove this variable"
            )
