"""Conversations to token ids, the boundary between prompt and response checked.

The layout: the prompt is the rendered conversation with the header of the answer; a response is the
answer and exactly one end token. The BOS token stands once, in front of the prompt, if the model
has one: where the template does not write it, it is put there as the tokenizer itself would. Generated responses never come this way: they are trained on as
the ids that were drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class ChatError(ValueError):
    """A conversation that does not become unambiguous token ids."""


class Turn(Protocol):
    """A message of a conversation."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


class Chat:
    """The tokenizer and chat template of a model folder.

    Attributes:
      stop_ids: tokens that end a response, from the generation config and the tokenizer.

    Raises:
      ChatError: a folder without tokenizer, without chat template or without an end token.
    """

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer  # here, because it takes seconds to import

        folder = Path(folder)
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            raise ChatError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model) there")
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if not self.tokenizer.chat_template:
            raise ChatError(f"{folder}: the tokenizer has no chat template (chat_template.jinja)")
        self.stop_ids = _stop_ids(folder, self.tokenizer)
        own = self.tokenizer("")["input_ids"]  # what the tokenizer puts around any text
        self._bos: int | None = own[0] if own[:1] == [self.tokenizer.bos_token_id] else None

    def prompt_ids(self, messages: Sequence[Turn]) -> tuple[int, ...]:
        """The conversation and the header of the answer that is to follow."""
        ids = self._ids(self._render(messages, answer_follows=True))
        if not ids:
            raise ChatError(f"the conversation {list(messages)!r} has no tokens")
        return ids

    def response_ids(self, messages: Sequence[Turn], text: str) -> tuple[int, ...]:
        """The answer's ids, ended by the template's end token, as they follow `prompt_ids`.

        Raises:
          ChatError: the template does not render the prompt as a prefix of the conversation (both
            renderings are shown), or does not end an answer with a stop token, or the answer itself
            spells one out.
        """
        prompt = self._render(messages, answer_follows=True)
        full = self._render([*messages, _Message("assistant", text)], answer_follows=False)
        if not full.startswith(prompt):
            raise ChatError(
                "the chat template does not keep the prompt when the answer is added.\n"
                f"prompt:       {prompt!r}\nconversation: {full!r}"
            )
        if spelled := self._stops(self._tokens(text)):
            raise ChatError(f"the answer spells out {', '.join(spelled)}, which ends one: {text!r}")
        before, ids = self._ids(prompt), self._ids(full)
        if ids[: len(before)] == before:
            ids = ids[len(before) :]
        else:
            # A token spans the boundary. After this prompt it can never be drawn: tokenize apart.
            ids = self._tokens(full[len(prompt) :])
        if not self._stops(ids):
            raise ChatError(
                f"the chat template does not end an answer with one of the stop tokens "
                f"{self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))}: {full!r}"
            )
        end = next(i for i, token in enumerate(ids) if token in self.stop_ids)
        return ids[: end + 1]

    def text(self, ids: Sequence[int]) -> str:
        """What people and rankers read: special tokens left out, white space around it stripped."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _render(self, messages: Sequence[Turn], answer_follows: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer_follows
        )

    def _ids(self, rendered: str) -> tuple[int, ...]:
        """Ids of a rendered conversation, with BOS in front once if the model has it."""
        ids, bos = self._tokens(rendered), self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            raise ChatError(
                f"the chat template writes {self.tokenizer.bos_token} twice: {rendered!r}"
            )
        return ids if self._bos is None or ids[:1] == (bos,) else (self._bos, *ids)

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _stops(self, ids: tuple[int, ...]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens([i for i in ids if i in self.stop_ids])


class _Message:
    def __init__(self, role: str, content: str):
        self.role, self.content = role, content


def _stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    configured = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = configured if isinstance(configured, list) else [configured]
    stops = {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}
    if not stops:
        raise ChatError(f"{folder}: neither generation_config.json nor the tokenizer has an EOS")
    return tuple(sorted(stops))
