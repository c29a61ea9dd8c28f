"""Rebuilds the tokenizer inside a GGUF file as Hugging Face's tokenizer.json.

Only byte-level BPE is supported: the file contains tokens and merges, and the name of a rule that
splits text before the merges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from selm_jax.weights.gguf_file import MEND, Fields, GGUFError

SPECIAL_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}


# Contractions, words, numbers, symbols, line ends, blanks; {} is the number of digits in a piece.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_SPLIT.format(digits)), "isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


@dataclass(frozen=True)
class _Rule:
    """A rule that splits text into pieces; BPE merges never cross the border of a piece.

    Attributes:
      cut: makes the pre-tokenizer.
      nfc: whether text is first normalised to Unicode's NFC.
      whole_words: whether a piece that is a token becomes that token, regardless of the merges.
      bos: whether BOS is put before a text unless the file says otherwise.
    """

    cut: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


# GGUF contains only the name of the rule; its meaning is in llama.cpp's code. A wrong guess would
# give almost correct tokens, so a name that is not listed here is an error.
_RULES = {
    "smollm": _Rule(
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
        )
    ),
    "llama-bpe": _Rule(lambda: _split("{1,3}"), whole_words=True, bos=True),
    "qwen2": _Rule(lambda: _split(""), nfc=True),
}


def build_tokenizer(fields: Fields) -> Tokenizer:
    """Builds a tokenizer with the ids of the GGUF file; it adds BOS if the file says so.

    Raises:
      GGUFError: if the kind of tokenizer is not supported, or its lists do not fit together.
    """
    model = fields.need("tokenizer.ggml.model", str)
    pre = fields.need("tokenizer.ggml.pre", str)
    if model != "gpt2" or pre not in _RULES:
        raise GGUFError(
            f"{fields.path}: tokenizer {model!r} with pre {pre!r} is not supported; supported are "
            f"'gpt2' with {sorted(_RULES)}. Get the model as a Hugging Face folder instead"
        )
    rule = _RULES[pre]
    for flag in ("add_eos_token", "add_space_prefix"):
        if fields.get(f"tokenizer.ggml.{flag}", bool):
            raise GGUFError(
                f"{fields.path}: tokenizer.ggml.{flag} is set, which is not supported. {MEND}"
            )

    tokens = fields.texts("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise GGUFError(f"{fields.path}: token {twice!r} occurs twice in the vocabulary. {MEND}")
    merges = []
    for row, merge in enumerate(fields.texts("tokenizer.ggml.merges")):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise GGUFError(
                f"{fields.path}: tokenizer.ggml.merges, row {row}: {merge!r} uses or makes a token "
                f"that is not in the vocabulary. {MEND}"
            )
        merges.append((left, right))

    # unk_token=None, as published: a byte that is not in the vocabulary is left out and never
    # becomes the end-of-text token.
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token=None, ignore_merges=rule.whole_words)
    tokenizer = Tokenizer(bpe)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.cut()
    tokenizer.decoder = decoders.ByteLevel()
    if _adds_bos(fields):
        bos_id = fields.need(SPECIAL_IDS["bos"], int)
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )

    types = fields.need("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise GGUFError(f"{fields.path}: {len(tokens)} tokens but {len(types)} token types. {MEND}")
    for token, kind in zip(tokens, types, strict=True):
        # Already in the vocabulary, so each keeps its id.
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    return tokenizer


def _adds_bos(fields: Fields) -> bool:
    said = fields.get("tokenizer.ggml.add_bos_token", bool)
    return _RULES[fields.need("tokenizer.ggml.pre", str)].bos if said is None else said


def eos_ids(fields: Fields) -> dict[str, Any]:
    """`eos_token_id` for generation_config.json: the ids that end a text or a turn."""
    eos = fields.need(SPECIAL_IDS["eos"], int)
    key = "tokenizer.ggml.eot_token_id"
    turn = fields.get(key, int)
    if turn is not None and not 0 <= turn < len(fields.texts("tokenizer.ggml.tokens")):
        raise GGUFError(f"{fields.path}: key {key} is {turn}, outside the vocabulary. {MEND}")
    return {"eos_token_id": eos if turn in (None, eos) else [eos, turn]}


def tokenizer_config(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json; `config` is the model's config.json."""
    tokens = fields.texts("tokenizer.ggml.tokens")
    special = {name: fields.get(key, int) for name, key in SPECIAL_IDS.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[i] for name, i in special.items() if i is not None},
        "add_bos_token": _adds_bos(fields),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
