"""Rebuilds the tokenizer inside a GGUF file as Hugging Face's tokenizer.json.

Three kinds are supported. For byte-level BPE ("gpt2"), the file contains tokens and merges, and the
name of a rule that splits text before the merges. For SentencePiece's BPE ("llama"), it contains
tokens with scores; the pair whose token has the highest score is merged first. Gemma 4's kind
("gemma4") has SentencePiece's tokens, and merges in place of the scores.
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
_UPPER, _LOWER = (rf"[\p{{{case}}}\p{{Lm}}\p{{Lo}}\p{{M}}]" for case in ("Lu}\\p{Lt", "Ll"))
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


def _by_case(ending: str, digits: str) -> str:
    """The pattern of a split that also cuts words where a capital follows."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}|\p{{N}}{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


def _single_digits() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level(use_regex=True)])


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
    "smollm": _Rule(_single_digits),
    "refact": _Rule(_single_digits),  # of Granite, too
    "exaone4": _Rule(lambda: _byte_level(use_regex=True)),
    "gpt-2": _Rule(lambda: _byte_level(use_regex=True)),
    "llama-bpe": _Rule(lambda: _split(_SPLIT.format("{1,3}")), whole_words=True, bos=True),
    "dbrx": _Rule(lambda: _split(_SPLIT.format("{1,3}"))),  # of OLMo 2 and 3, too
    "glm4": _Rule(lambda: _split(_SPLIT.format("{1,3}"))),
    "smaug-bpe": _Rule(lambda: _split(_SPLIT.format("{1,3}"))),  # of SmolLM3, too
    "qwen2": _Rule(lambda: _split(_SPLIT.format("")), nfc=True),
    "gpt-4o": _Rule(lambda: _split(_by_case(_CONTRACTION, "{1,3}"))),  # of Phi-4-mini, too
    "tekken": _Rule(lambda: _split(_by_case("", "")), whole_words=True, bos=True),
}

_MODEL = "tokenizer.ggml.model"
_SPM = "llama"  # llama.cpp's name for SentencePiece's BPE
_GEMMA4 = "gemma4"
_BLANK = "\u2581"  # what SentencePiece has in place of a blank


def build_tokenizer(fields: Fields) -> Tokenizer:
    """Builds a tokenizer with the ids of the GGUF file; it adds BOS if the file says so.

    Raises:
      GGUFError: if the kind of tokenizer is not supported, or its lists do not fit together.
    """
    if fields.get("tokenizer.ggml.add_eos_token", bool):
        raise GGUFError(
            f"{fields.path}: tokenizer.ggml.add_eos_token is set, which is not supported. {MEND}"
        )
    tokens, types = fields.texts("tokenizer.ggml.tokens"), _types(fields)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise GGUFError(f"{fields.path}: token {twice!r} occurs twice in the vocabulary. {MEND}")
    model = fields.need(_MODEL, str)
    makers = {_SPM: _sentencepiece, _GEMMA4: _gemma4}
    tokenizer = makers.get(model, _byte_level_bpe)(fields, vocab)
    if _adds_bos(fields):
        bos_id = fields.need(SPECIAL_IDS["bos"], int)
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    # Phi-3 reads no blanks and line ends behind its marks; this is in llama.cpp's code.
    marks = model == _SPM and fields.get("general.architecture", str) == "phi3"
    for token, kind in zip(tokens, types, strict=True):
        # Already in the vocabulary, so each keeps its id.
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            rstrip = marks and token not in ("<unk>", "<s>", "<|endoftext|>")
            added = AddedToken(token, normalized=False, special=True, rstrip=rstrip)
            tokenizer.add_special_tokens([added])
        elif kind == TokenType.USER_DEFINED:
            # One with SentencePiece's blanks is looked for after these were put into the text.
            blanks = model in makers and _BLANK in token
            added = AddedToken(token, normalized=blanks, special=False)
            tokenizer.add_tokens([added])
    return tokenizer


def _types(fields: Fields) -> list[int]:
    tokens, types = (fields.need(f"tokenizer.ggml.{key}", list) for key in ("tokens", "token_type"))
    if len(types) != len(tokens):
        raise GGUFError(f"{fields.path}: {len(tokens)} tokens but {len(types)} token types. {MEND}")
    return types


def _byte_level_bpe(fields: Fields, vocab: dict[str, int]) -> Tokenizer:
    model = fields.need(_MODEL, str)
    pre = fields.need("tokenizer.ggml.pre", str)
    if model != "gpt2" or pre not in _RULES:
        raise GGUFError(
            f"{fields.path}: tokenizer {model!r} with pre {pre!r} is not supported; supported are "
            f"{_SPM!r}, {_GEMMA4!r}, and 'gpt2' with {sorted(_RULES)}. Get the model as a Hugging "
            "Face folder instead"
        )
    rule = _RULES[pre]
    # unk_token=None, as published: a byte that is not in the vocabulary is left out and never
    # becomes the end-of-text token.
    bpe = models.BPE(
        vocab=vocab,
        merges=_merges(fields, vocab),
        unk_token=None,
        ignore_merges=rule.whole_words,
    )
    tokenizer = Tokenizer(bpe)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.cut()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(fields: Fields, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a file, which adds no blank before a text."""
    if fields.get("tokenizer.ggml.add_space_prefix", bool):
        raise GGUFError(
            f"{fields.path}: tokenizer.ggml.add_space_prefix is set, which is not supported. {MEND}"
        )
    merges = []
    for row, merge in enumerate(fields.texts("tokenizer.ggml.merges")):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise GGUFError(
                f"{fields.path}: tokenizer.ggml.merges, row {row}: {merge!r} uses or makes a token "
                f"that is not in the vocabulary. {MEND}"
            )
        merges.append((left, right))
    return merges


def _gemma4(fields: Fields, vocab: dict[str, int]) -> Tokenizer:
    types = _types(fields)
    unknown = [token for token, i in vocab.items() if types[i] == TokenType.UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(fields, vocab),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=TokenType.BYTE in types,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", _BLANK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for token in vocab:
        # llama.cpp takes line ends that are a token whole, whatever the merges say.
        if set(token) == {"\n"} and tokenizer.encode(token).tokens != [token]:
            raise GGUFError(
                f"{fields.path}: tokenizer.ggml.merges do not make the token {token!r} of line "
                f"ends, which is not supported. {MEND}"
            )
    return tokenizer


def _sentencepiece(fields: Fields, vocab: dict[str, int]) -> Tokenizer:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if fields.get(f"tokenizer.ggml.{key}", object):
            raise GGUFError(
                f"{fields.path}: tokenizer.ggml.{key} is set, which is not supported. {MEND}"
            )
    scores, types = fields.need("tokenizer.ggml.scores", list), _types(fields)
    unknown = [token for token, i in vocab.items() if types[i] == TokenType.UNKNOWN]
    if len(scores) != len(vocab) or len(unknown) != 1:
        raise GGUFError(
            f"{fields.path}: {len(vocab)} tokens, {len(scores)} scores and {len(unknown)} unknown "
            f"tokens; expected as many scores as tokens, and one unknown token. {MEND}"
        )
    merges = []
    for token, i in vocab.items():
        if types[i] == TokenType.NORMAL:
            cuts = ((token[:n], token[n:]) for n in range(1, len(token)))
            merges += [(scores[i], *cut) for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    bpe = models.BPE(
        vocab=vocab,
        merges=[(left, right) for _, left, right in merges],
        unk_token=unknown[0],
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in types,
    )
    tokenizer = Tokenizer(bpe)
    blanks = normalizers.Replace(" ", _BLANK)
    back = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", bool) is False:
        tokenizer.normalizer = blanks
    else:
        for token, i in vocab.items():
            # It would be looked for with a further blank in front.
            if types[i] == TokenType.USER_DEFINED and _BLANK in token:
                raise GGUFError(
                    f"{fields.path}: token {token!r} is user-defined and has a blank, which is not "
                    f"supported together with tokenizer.ggml.add_space_prefix. {MEND}"
                )
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), blanks])
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _adds_bos(fields: Fields) -> bool:
    said, model = fields.get("tokenizer.ggml.add_bos_token", bool), fields.get(_MODEL, str)
    if model == _GEMMA4:
        return True  # in llama.cpp's code
    if said is not None:
        return said
    if model == _SPM:
        return True  # llama.cpp's default
    return _RULES[fields.need("tokenizer.ggml.pre", str)].bos


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
