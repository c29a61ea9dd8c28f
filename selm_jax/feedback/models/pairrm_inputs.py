"""PairRM's inputs: texts as segments of token ids, and conversations as texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken

from selm_jax.feedback.ranker import FeedbackError, Question
from selm_jax.text.tokenizer import FILE, ChatError, read_backend
from selm_jax.weights.deberta import PairRMConfig

Ids: TypeAlias = Int32[np.ndarray, " tokens"]

SOURCE, FIRST, SECOND, EITHER = "<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"
_PREFIXES = re.compile("|".join(map(re.escape, (SOURCE, FIRST, SECOND, EITHER))))

# As in `compare_conversations` of LLM-Blender; the spelling is what the model was trained on.
_TURNS = (
    "Finish the following coversation in each i-th turn by filling in <Response i> with your "
    "response."
)


class PairTokens:
    """Encodes texts as PairRM's segments, with the tokenizer.json of the model's folder.

    Raises:
        FeedbackError: the tokenizer is missing, lacks a special token, or does not fit the model.
    """

    def __init__(self, folder: Path, config: PairRMConfig):
        file = Path(folder) / FILE
        if not file.is_file():
            raise FeedbackError(
                f"ranker 'pairrm': {file} is missing. Take it from llm-blender/PairRM-hf, or "
                "create it with transformers: AutoTokenizer.from_pretrained('microsoft/"
                f"deberta-v3-large').save_pretrained({str(folder)!r})"
            )
        try:
            self._tokenizer = read_backend(Path(folder))
        except ChatError as e:
            raise FeedbackError(f"ranker 'pairrm': {e}") from e
        known = self._tokenizer.token_to_id
        # Like transformers' add_tokens, which appended PairRM's four tokens to DeBERTa's.
        new = [t for t in (SOURCE, FIRST, SECOND, EITHER) if known(t) is None]
        self._tokenizer.add_tokens([AddedToken(t, normalized=True) for t in new])
        names = ("[CLS]", "[SEP]", "[PAD]", SOURCE, FIRST, SECOND)
        found = [i for i in map(known, names) if i is not None]
        if len(found) < len(names):
            lacking = ", ".join(name for name in names if known(name) is None)
            raise FeedbackError(
                f"ranker 'pairrm': {file} has no token {lacking}; expected PairRM's tokenizer"
            )
        self._cls, self._sep, self.pad, *_ = found
        self.prefix_ids = tuple(found[3:])
        if config.prefix_ids not in (None, self.prefix_ids):
            raise FeedbackError(
                f"ranker 'pairrm': {file} gives the prefix tokens the ids {self.prefix_ids}, but "
                f"config.json the ids {config.prefix_ids}; take both files from one source"
            )
        if (most := max(found)) >= config.encoder.vocab_size:
            raise FeedbackError(
                f"ranker 'pairrm': {file} has token ids up to {most}, but the model's embedding "
                f"only has {config.encoder.vocab_size} rows; take both from one source"
            )

    def encode(self, prefix: str, texts: Sequence[str]) -> list[Ids]:
        """Encodes each text as [CLS] prefix text [SEP]. Prefixes in a text become spaces."""
        glued = [prefix + _PREFIXES.sub(" ", text) for text in texts]
        encodings = self._tokenizer.encode_batch(glued, add_special_tokens=False)
        return [np.array([self._cls, *e.ids, self._sep], np.int32) for e in encodings]

    def cut(self, ids: Ids, budget: int) -> Ids:
        """Cuts a segment to `budget` tokens, the last of which is [SEP]."""
        return ids if len(ids) <= budget else np.append(ids[: budget - 1], np.int32(self._sep))


def conversation(question: Question, candidates: Sequence[str]) -> tuple[str, list[str]]:
    """Writes a conversation as PairRM's texts (source, candidates).

    With one user turn, these are its text and the responses. With several turns, it is
    LLM-Blender's form for conversations: the source has all user turns, and each candidate has the
    earlier answers before its own.

    Raises:
        FeedbackError: user and assistant do not alternate, or the last message is not the user's.
            A system message may come first.
    """
    turns = list(question.messages)
    turns = turns[1:] if turns and turns[0].role == "system" else turns
    if len(turns) <= 1:
        return question.prompt, list(candidates)
    if [t.role for t in turns] != [("user", "assistant")[i % 2] for i in range(len(turns))] or (
        turns[-1].role != "user"
    ):
        raise FeedbackError(
            f"ranker 'pairrm', prompt {question.id!r}: the roles are "
            f"{[t.role for t in question.messages]}; expected user and assistant in turn, "
            "beginning and ending with the user."
        )
    asked = [t.content for t in turns[::2]]
    answers = [t.content for t in turns[1::2]]
    source = _TURNS + "\n".join(
        f"USER: {text}\nAssistant: <Response {i}>" for i, text in enumerate(asked, 1)
    )
    return source, [
        "\n".join(f"<Response {i}>: {text}" for i, text in enumerate([*answers, last], 1))
        for last in candidates
    ]
