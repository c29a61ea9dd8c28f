"""Conversations to token ids, the boundary between prompt and response checked.

The layout: the prompt is the rendered conversation with the header of the answer; a response is the
answer and exactly one end token. The BOS token stands once, in front of the prompt, if the model
has one: where the template does not write it, it is put there as the tokenizer itself would. (A
template that opens every user turn with BOS, as Llama 2's does, keeps those.) Generated responses
never come this way: they are trained on as the ids that were drawn.
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
    """An answer that cannot follow its prompt; other answers may."""


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
      settings: `template` and `date` are what the template reads besides the messages;
        `special_tokens` says what control tokens are that a message spells out.
      vocabulary: rows of the model's embedding; None: nobody asks.

    Attributes:
      stop_ids: tokens that end a response, from the generation config and the tokenizer.
      spelled: finds control tokens in texts.

    Raises:
      ChatError: a folder without tokenizer, without chat template or without an end token, a file
        that cannot be read, more ordinary tokens than the embedding has rows, or a variable that
        the template does not read.
    """

    def __init__(self, folder: Path, settings: Text = Text(), vocabulary: int | None = None):  # noqa: B008 (it is frozen)
        self.folder = folder = Path(folder)
        self.tokenizer = Tokenizer(folder)
        self._vocabulary = checked_vocabulary(self.tokenizer, vocabulary)
        found = find_chat_template(folder)
        if found is None:
            raise ChatError(f"{folder}: the tokenizer has no chat template (chat_template.jinja)")
        where, source = found
        _check_variables(folder, self.tokenizer, source, settings.template)
        variables = self.tokenizer.special | settings.template
        self._template = Template(source, where, variables, settings.date)
        self.stop_ids = stop_ids(folder, self.tokenizer, vocabulary)
        self._stop_texts = [self.tokenizer.decode([i]) for i in self.stop_ids]
        self.spelled = Spelled(control_tokens(self.tokenizer, self.stop_ids))
        as_text = settings.special_tokens == "as_text"
        self._literal = Literal(self.tokenizer, self.spelled) if as_text else None
        own = self.tokenizer.encode("")  # what the tokenizer puts around any text
        self._bos: int | None = own[0] if own[:1] == [self.tokenizer.bos_token_id] else None
        self._opened = lru_cache(32)(self._open)  # the answers to a prompt come one after another

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the folder says: tokenizer, special tokens, template and ends."""
        said = [self.tokenizer.digest(), self._template.source, self.stop_ids]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def prompt_ids(self, messages: Sequence[Turn]) -> tuple[int, ...]:
        """The conversation and the header of the answer that is to follow.

        Raises:
          ChatError: the template refuses the conversation, leaves its system message out, or
            writes BOS twice.
        """
        _, ids = self._opened(tuple((m.role, m.content) for m in messages))
        if not ids:
            raise ChatError(f"the conversation {list(messages)!r} has no tokens")
        return ids

    def response_ids(self, messages: Sequence[Turn], text: str) -> tuple[int, ...]:
        """The answer's ids, ended by the template's end token, as they follow `prompt_ids`.

        Raises:
          UnusableAnswer: the answer is empty or spells out an end token; or the template does not
            render the prompt as a prefix of the conversation (both renderings are shown), puts
            more in front of the answer, or does not end it with a stop token.
          ChatError: the template refuses the conversation.
        """
        if not text.strip():
            raise UnusableAnswer("the answer is empty: there is nothing to score")
        if spelled := self.spelled_ends(text):
            raise UnusableAnswer(
                f"the answer spells out {', '.join(spelled)}, which ends one: {text!r}"
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
            # A token spans the boundary. After this prompt it can never be drawn: tokenize apart.
            ids = self._within(answer)
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None:
            raise UnusableAnswer(self._endless(full))
        return ids[: end + 1]

    def conversation_ids(self, messages: Sequence[Turn], text: str) -> tuple[int, ...]:
        """The conversation with an answer, as a reward model reads it: all that the template writes.

        What stands behind the answer's end token belongs to it (most often a line break). The text
        is taken as it is: an empty answer is one too.

        Raises:
          ChatError: as for `prompt_ids`.
        """
        answered = [*messages, Message("assistant", text)]
        rendered = self._marked(answered, answer_follows=False)
        self._check_system(answered, rendered, answer_follows=False)  # some forget it only now
        return self._ids(answered, rendered)

    def spelled_ends(self, text: str) -> list[str]:
        """The end tokens that a text spells out, if what it spells is a token."""
        if self._literal is not None:
            return []
        if not any(end in text for end in self._stop_texts):  # the usual case, and much faster
            return []
        return self._names(i for i in self.tokens(text) if i in self.stop_ids)

    def text(self, ids: Sequence[int]) -> str:
        """What people and rankers read: special tokens left out, white space around it stripped."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def render(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        """The conversation as the template writes it, with the header of an answer or without.

        Raises:
          ChatError: the template refuses the conversation or leaves its system message out.
        """
        return self._plain(self._marked(messages, answer_follows))

    def rendered_ids(self, messages: Sequence[Turn], *more: Sequence[Turn]) -> tuple[int, ...]:
        """Ids of what the template writes of conversations without headers, one behind the other:
        BOS stands in front only if the template writes it."""
        return self._tokens("".join(self._marked(each, False) for each in (messages, *more)))

    def continued(self, messages: Sequence[Turn]) -> str:
        """The conversation with its last message left open, for a model to go on with.

        Raises:
          ChatError: the template refuses it, or does not keep the last message.
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
                f"the chat template of {self.folder} changes the last message, so that no model can "
                f"go on with it: {rendered!r}"
            )
        trimmed = not rendered[len(text) :].startswith(_HERE)  # as transformers leaves it then
        return self._plain(text.rstrip() if trimmed else text)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Ids of a text and nothing around it."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def check_made_up(self) -> None:
        """Tries the template with a made-up question and answer.

        The header that a prompt ends with must be what an answer follows, and a stop token must end
        an answer: else the policy goes on with turns that it makes up itself.

        Raises:
          ChatError: it is not so.
        """
        question, answer = [Message("user", "Is it?")], "Yes."
        prompt = self._marked(question, answer_follows=True)
        full = self._marked([*question, Message("assistant", answer)], answer_follows=False)
        before, found, behind = full.rpartition(answer)
        if not found:
            raise ChatError(f"the chat template of {self.folder} leaves an answer out: {full!r}")
        opens = prompt != self._marked(question, answer_follows=False)  # there is a header
        if not opens and (not full.startswith(prompt) or before[len(prompt) :].strip()):
            raise ChatError(
                f"the chat template of {self.folder} does not begin an answer: it writes "
                f"{before[len(prompt) :]!r} in front of one, but not where one is asked for "
                f"(add_generation_prompt).\nprompt:       {prompt!r}\nconversation: {full!r}\n"
                "Add the header to the template, behind `{% if add_generation_prompt %}`"
            )
        if not set(self._within(answer + behind)) & set(self.stop_ids):
            raise ChatError(self._endless(full))

    def _open(self, said: tuple[tuple[str, str], ...]) -> tuple[str, tuple[int, ...]]:
        """(Role, content), ... with the header of an answer, as the template writes it, and its ids."""
        messages = [Message(*each) for each in said]
        prompt = self._marked(messages, answer_follows=True)
        return prompt, self._ids(messages, prompt)

    def _rendered(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        """What the template writes, with stand-ins for what messages spell."""
        said = [{"role": m.role, "content": self._mark(m.content)} for m in messages]
        return self._template.render(said, answer_follows)

    def _marked(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        """The same; raises ChatError if the template refuses or leaves a system message out."""
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
        """Raises ChatError if the rendered conversation has a system message no more."""
        for i, message in enumerate(messages):
            if message.role == "system" and (content := message.content.strip()):
                rest = [*messages[:i], *messages[i + 1 :]]
                there = self._mark(content) in rendered
                if not there and rendered == self._try(rest, answer_follows):
                    raise ChatError(
                        f"the chat template of {self.folder} leaves out the system message "
                        f"{content!r}. Put what it says into the user's turn (data.system puts a "
                        "system message before every prompt, and data.system_column the row's own)"
                    )

    def _try(self, messages: Sequence[Turn], answer_follows: bool) -> str | None:
        """The conversation as the template writes it; None if it refuses."""
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
                "It takes the conversation without the system message: leave data.system out (and "
                "set data.system_column to null, where a column holds such messages), "
                "or put what it says into the user's turn"
            )
        return said + "Bring the turns into an order that it takes (mostly user, assistant, user)"

    def _endless(self, full: str) -> str:
        return (
            "the chat template does not end an answer with one of the stop tokens "
            f"{self._names(self.stop_ids)}: {self._plain(full)!r}. If it ends with another token, "
            "add that token's id to eos_token_id in "
            f"{self.folder / 'generation_config.json'}"
        )

    def _ids(self, messages: Sequence[Turn], rendered: str) -> tuple[int, ...]:
        """Ids of a rendered conversation, with BOS in front once if the model has it."""
        ids, bos = self._tokens(rendered), self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            raise ChatError(
                f"the chat template of {self.folder} writes {self.tokenizer.bos_token} twice: "
                f"{rendered!r}. Take one of them out of the template (or out of the message)"
            )
        if self._bos is None or ids[:1] == (bos,):
            return ids
        # The template may write BOS behind other text; what messages spell is theirs.
        text = self.tokenizer.bos_token or ""
        spelled = sum(self._mark(m.content).count(text) for m in messages)
        return ids if rendered.count(text) > spelled else (self._bos, *ids)

    def _tokens(self, marked: str) -> tuple[int, ...]:
        """Ids of what the template wrote, all of which the model's embedding has."""
        ids = self.tokens(marked) if self._literal is None else tuple(self._literal.encode(marked))
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            raise ChatError(
                f"the text {self._plain(marked)!r} has the token {self._names([max(ids)])[0]!r}, "
                f"whose id is {max(ids)}; the model's embedding has {self._vocabulary} rows. Take "
                "the token out of the text, or a model whose embedding has it"
            )
        return ids

    def _within(self, marked: str) -> tuple[int, ...]:
        """Ids of a text that goes on from another: without the space that opens a text alone."""
        anchor = self.tokenizer.eos_token or self._names(self.stop_ids)[0]
        return self._tokens(anchor + marked)[1:]

    def _names(self, ids) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(list(ids))


_HERE = (
    "\ue000here "  # behind a message that is left open; the space tells whether texts are trimmed
)
_THINKING = (
    "Where the prompt ends there must begin an answer as the data has it. A thinking model's "
    "template mostly does so with `text.template: {enable_thinking: false}`"
)


class Message:
    """A turn that this module makes."""

    def __init__(self, role: str, content: str):
        self.role, self.content = role, content


def _squeezed(text: str) -> str:
    """Without white space: templates trim answers, and some add a space."""
    return "".join(text.split())


# What a template is given besides messages; special tokens come with the tokenizer.
_OURS = {"messages", "add_generation_prompt", "tools", "documents", "strftime_now", "today"}


def _check_variables(
    folder: Path, tokenizer: Tokenizer, template: str, variables: Mapping[str, object]
) -> None:
    for name in variables:
        if name in _OURS or name in tokenizer.special:
            raise ChatError(f"text.template: {name!r} is not for an experiment to set")
        if name not in template:
            raise ChatError(f"text.template: the chat template of {folder} never reads {name!r}")
