"""Conversations to token ids, the boundary between prompt and response checked.

The layout: the prompt is the rendered conversation with the header of the answer; a response is the
answer and exactly one end token. The BOS token stands once, in front of the prompt, if the model
has one: where the template does not write it, it is put there as the tokenizer itself would. (A
template that opens every user turn with BOS, as Llama 2's does, keeps those.) Generated responses
never come this way: they are trained on as the ids that were drawn.
"""

from __future__ import annotations

import datetime
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from selm_jax.config import Text


class ChatError(ValueError):
    """A conversation that does not become unambiguous token ids."""


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
      settings: `template` and `date` are what the template reads besides the messages.

    Attributes:
      stop_ids: tokens that end a response, from the generation config and the tokenizer.

    Raises:
      ChatError: a folder without tokenizer, without chat template or without an end token, or a
        variable that the template does not read.
    """

    def __init__(self, folder: Path, settings: Text = Text()):  # noqa: B008 (it is frozen)
        folder = Path(folder)
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.chat_template:
            raise ChatError(f"{folder}: the tokenizer has no chat template (chat_template.jinja)")
        template = self.tokenizer.get_chat_template()
        _check_variables(folder, self.tokenizer, template, settings.template)
        self._template = _with_date(template, settings.date)
        self._variables = settings.template
        self.stop_ids = stop_ids(folder, self.tokenizer)
        self._stop_texts = [self.tokenizer.decode([i]) for i in self.stop_ids]
        own = self.tokenizer("")["input_ids"]  # what the tokenizer puts around any text
        self._bos: int | None = own[0] if own[:1] == [self.tokenizer.bos_token_id] else None

    def prompt_ids(self, messages: Sequence[Turn]) -> tuple[int, ...]:
        """The conversation and the header of the answer that is to follow.

        Raises:
          ChatError: the template refuses the conversation, leaves its system message out, or
            writes BOS twice.
        """
        ids = self._ids(self.render(messages, answer_follows=True))
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
        prompt = self.render(messages, answer_follows=True)
        full = self.render([*messages, _Message("assistant", text)], answer_follows=False)
        both = f"prompt:       {prompt!r}\nconversation: {full!r}"
        if not full.startswith(prompt):
            raise UnusableAnswer(
                f"the chat template does not keep the prompt when the answer is added.\n{both}\n"
                f"{_THINKING}"
            )
        answer = full[len(prompt) :]
        if not _squeezed(answer).startswith(_squeezed(text)):
            raise UnusableAnswer(
                f"the chat template changes the answer, or puts more in front of it.\n{both}\n"
                f"{_THINKING}"
            )
        before, ids = self._ids(prompt), self._ids(full)
        if ids[: len(before)] == before:
            ids = ids[len(before) :]
        else:
            # A token spans the boundary. After this prompt it can never be drawn: tokenize apart.
            ids = self._within(answer)
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None:
            raise UnusableAnswer(
                "the chat template does not end an answer with one of the stop tokens "
                f"{self._names(self.stop_ids)}: {full!r}. If it ends with another token, add that "
                f"token's id to eos_token_id in {self.folder / 'generation_config.json'}"
            )
        return ids[: end + 1]

    def conversation_ids(self, messages: Sequence[Turn], text: str) -> tuple[int, ...]:
        """The conversation with an answer, as a reward model reads it: all that the template writes.

        What stands behind the answer's end token belongs to it (most often a line break). The text
        is taken as it is: an empty answer is one too.

        Raises:
          ChatError: as for `prompt_ids`.
        """
        answered = [*messages, _Message("assistant", text)]
        rendered = self.render(answered, answer_follows=False)
        self._check_system(answered, rendered, answer_follows=False)  # some forget it only now
        return self._ids(rendered)

    def spelled_ends(self, text: str) -> list[str]:
        """The end tokens that a text spells out."""
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
        try:
            rendered = self._rendered(messages, answer_follows)
        except TemplateError as e:
            raise ChatError(self._refusal(messages, answer_follows, e)) from e
        if messages[-1].role == "user":
            self._check_system(messages, rendered, answer_follows)
        return rendered

    def continued(self, messages: Sequence[Turn]) -> str:
        """The conversation with its last message left open, for a model to go on with.

        Raises:
          ChatError: the template refuses it.
        """
        try:
            return self._rendered(messages, False, continue_final_message=True)
        except (TemplateError, ValueError) as e:  # ValueError: it changes the last message's text
            raise ChatError(self._refusal(messages, False, e)) from e

    def tokens(self, text: str) -> tuple[int, ...]:
        """Ids of a text and nothing around it."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _rendered(self, messages: Sequence[Turn], answer_follows: bool, **how: bool) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=answer_follows,
            **self._variables,
            **how,
        )

    def _check_system(self, messages: Sequence[Turn], rendered: str, answer_follows: bool) -> None:
        """Raises ChatError if the rendered conversation has a system message no more."""
        for i, message in enumerate(messages):
            if message.role == "system" and (content := message.content.strip()):
                rest = [*messages[:i], *messages[i + 1 :]]
                if content not in rendered and rendered == self._try(rest, answer_follows):
                    raise ChatError(
                        f"the chat template of {self.folder} leaves out the system message "
                        f"{content!r}. Put what it says into the user's turn (data.system puts a "
                        "system message before every prompt)"
                    )

    def _try(self, messages: Sequence[Turn], answer_follows: bool) -> str | None:
        """The conversation as the template writes it; None if it refuses."""
        try:
            return self._rendered(messages, answer_follows)
        except TemplateError:
            return None

    def _refusal(self, messages: Sequence[Turn], answer_follows: bool, error: Exception) -> str:
        roles = ", ".join(m.role for m in messages)
        reason = str(error).rstrip(".")
        said = f"the chat template of {self.folder} refuses a conversation of {roles}: {reason}. "
        others = [m for m in messages if m.role != "system"]
        if len(others) < len(messages) and self._try(others, answer_follows):
            return said + (
                "It takes the conversation without the system message: leave data.system out, "
                "or put what it says into the user's turn"
            )
        return said + "Bring the turns into an order that it takes (mostly user, assistant, user)"

    def _ids(self, rendered: str) -> tuple[int, ...]:
        """Ids of a rendered conversation, with BOS in front once if the model has it."""
        ids, bos = self.tokens(rendered), self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            raise ChatError(
                f"the chat template writes {self.tokenizer.bos_token} twice: {rendered!r}"
            )
        return ids if self._bos is None or ids[:1] == (bos,) else (self._bos, *ids)

    def _within(self, text: str) -> tuple[int, ...]:
        """Ids of a text that goes on from another: without the space that opens a text alone."""
        anchor = self.tokenizer.eos_token or self._names(self.stop_ids)[0]
        return self.tokens(anchor + text)[1:]

    def _names(self, ids) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(list(ids))


_THINKING = (
    "Where the prompt ends there must begin an answer as the data has it. A thinking model's "
    "template mostly does so with `text.template: {enable_thinking: false}`"
)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises ChatError if there is none."""
    from transformers import AutoTokenizer  # here, because it takes seconds to import

    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise ChatError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model) there")
    return AutoTokenizer.from_pretrained(folder)


class _Message:
    def __init__(self, role: str, content: str):
        self.role, self.content = role, content


def _squeezed(text: str) -> str:
    """Without white space: templates trim answers, and some add a space."""
    return "".join(text.split())


def _with_date(template: str, date: datetime.date) -> str:
    """The template with `strftime_now`, if it is used, told to take this day for today."""
    if "strftime_now" not in template:
        return template
    written = {f"%{d}": date.strftime(f"%{d}") for d in [*"aAbBdejmyYFDHIMSp", "-d", "-m"]}
    replaced = "".join(f".replace({mark!r}, {text!r})" for mark, text in written.items())
    # A macro goes before the global function of this name. `+%}` keeps a line break that follows.
    macro = "{%- macro strftime_now(format) -%}{{- format" + replaced + " -}}{%- endmacro +%}"
    return macro + template


def _check_variables(
    folder: Path, tokenizer: Any, template: str, variables: Mapping[str, Any]
) -> None:
    ours = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    for name in variables:
        if name in ours or name == "strftime_now":
            raise ChatError(f"text.template: {name!r} is not for an experiment to set")
        if name not in template:
            raise ChatError(f"text.template: the chat template of {folder} never reads {name!r}")


def stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text, from the generation config (where there is none, the model's, as
    transformers does) and the tokenizer. Raises ChatError if none."""
    files = (folder / name for name in ("generation_config.json", "config.json"))
    file = next((file for file in files if file.exists()), None)
    configured = json.loads(file.read_text()).get("eos_token_id") if file else None
    ids = configured if isinstance(configured, list) else [configured]
    stops = {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}
    if not stops:
        raise ChatError(f"{folder}: neither the generation config nor the tokenizer has an EOS")
    return tuple(sorted(stops))
