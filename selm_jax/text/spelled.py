"""Handles control tokens in the text of a message, such as a user's `<|im_end|>`.

A tokenizer cannot tell whether the template or a user wrote `<|im_end|>`: to the model both end the
turn. `Literal` encodes control tokens as text if a message spells them, and as tokens if the
template wrote them. Stand-ins, characters from Unicode's private use area, tell them apart: before
rendering, one kind replaces each control token in a message; after rendering, another kind replaces
each one that the template wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import tokenizers

from selm_jax.text.tokenizer import ChatError, Tokenizer

# The first stand-ins for messages and for the template. Icon fonts use the characters below these.
_SPELLED, _WRITTEN = 0xF8000, 0x108000
_MOST = 0x7FF0


def control_tokens(tokenizer: Tokenizer, stop_ids: Iterable[int]) -> list[str]:
    """The tokens that the tokenizer marks as special, and those in `stop_ids`."""
    added = tokenizer.added_tokens_decoder
    stops = set(stop_ids)
    return [t.content for i, t in sorted(added.items()) if (t.special or i in stops) and t.content]


class Spelled:
    """Finds control tokens in texts; of several with the same start, it takes the longest."""

    def __init__(self, tokens: Sequence[str]):
        self.tokens = list(tokens)
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def find(self, text: str) -> list[str]:
        return self._any.findall(text)

    def replace(self, text: str, first: int) -> str:
        """Replaces the i-th control token by the character `first + i`, its stand-in."""
        number = {token: i for i, token in enumerate(self.tokens)}
        return self._any.sub(lambda match: chr(first + number[match[0]]), text)


class Literal:
    """Encodes conversations so that control tokens in messages become ordinary text.

    Args:
      tokenizer: the model's tokenizer.
      spelled: finds its control tokens.

    Raises:
      ChatError: if there are more control tokens than stand-ins.
    """

    def __init__(self, tokenizer: Tokenizer, spelled: Spelled):
        if len(spelled.tokens) > _MOST:
            raise ChatError(
                f"text.special_tokens: as_text supports at most {_MOST:,} control tokens, but "
                f"{tokenizer.folder} has {len(spelled.tokens):,}. Choose another value"
            )
        self._spelled = spelled
        whole = json.loads(tokenizer.backend.to_str())
        control = set(spelled.tokens)
        stand_in = {token: chr(_WRITTEN + i) for i, token in enumerate(spelled.tokens)}
        stand_ins = []
        for each in whole["added_tokens"]:
            if each["content"] in control:
                flags = {k: each[k] for k in ("single_word", "lstrip", "rstrip", "normalized")}
                stand_ins.append(
                    tokenizers.AddedToken(stand_in[each["content"]], special=False, **flags)
                )
                each["special"] = True  # otherwise `encode_special_tokens` would not apply to it
        backend = tokenizers.Tokenizer.from_str(json.dumps(whole))
        backend.encode_special_tokens = True
        backend.add_tokens(stand_ins)
        self._backend = backend
        self._ids = {
            backend.token_to_id(stand_in[token]): i
            for token in spelled.tokens
            if (i := tokenizer.backend.token_to_id(token)) is not None
        }

    def marked(self, text: str) -> str:
        """Replaces the control tokens of a message by stand-ins, before the template sees it.

        Raises:
          ChatError: if the message has a character that is used as a stand-in.
        """
        if found := next((c for c in text if _is_spelled(c) or ord(c) >= _WRITTEN), None):
            raise ChatError(
                f"a message has the private-use character U+{ord(found):X}, which "
                "text.special_tokens: as_text uses internally. Remove the character"
            )
        return self._spelled.replace(text, _SPELLED)

    def plain(self, marked: str) -> str:
        """Puts the control tokens back in place of their stand-ins, for people to read."""
        return "".join(
            self._spelled.tokens[ord(c) - _SPELLED] if _is_spelled(c) else c for c in marked
        )

    def encode(self, marked: str) -> list[int]:
        """Encodes a text that a template rendered from messages with stand-ins."""
        text = self.plain(self._spelled.replace(marked, _WRITTEN))
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self._ids.get(i, i) for i in ids]


def _is_spelled(character: str) -> bool:
    return _SPELLED <= ord(character) < _SPELLED + _MOST
