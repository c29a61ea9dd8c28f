"""Model folders with the files that `Chat` reads, one for each kind of tokenizer.

Each is made like the published one, small: what cuts texts, what stands in for spaces, digits, form
of Unicode, BOS, and the class that the published tokenizer_config.json names.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Contractions, words, numbers, symbols, line ends, blanks: as Llama 3 and Qwen cut texts.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def merged(letters: list[str], pairs: list[tuple[str, str]]) -> tuple[dict[str, int], list]:
    vocab = {letter: i for i, letter in enumerate(letters)}
    for left, right in pairs:
        vocab.setdefault(left + right, len(vocab))
    return vocab, pairs


def byte_level(
    cut: list[Any], special: list[str], bos: str | None = None, **more: Any
) -> Tokenizer:
    pairs = [
        ("Ċ", "Ċ"), (".", "Ċ"), ("1", "2"), ("12", "3"), ("Ġ", "1"), ("Ġ", "Ġ"), ("t", "h"),
        ("th", "e"), ("Ġ", "the"), ("Ã", "©"), ("e", "Ì"), ("eÌ", "ģ"), ("Ċ", "1"),
    ]  # fmt: skip
    tokenizer = Tokenizer(
        models.BPE(*merged(sorted(pre_tokenizers.ByteLevel.alphabet()), pairs), **more)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer, special, bos)


def sentences(
    special: list[str], bos: str, *, legacy: bool = True, metaspace: bool = False, **flags: bool
) -> Tokenizer:
    """SentencePiece made into tokenizer.json: ▁ for a space, and bytes for what is unknown."""
    letters = ["▁", *map(chr, range(33, 127)), "\n", "é"]
    names = [*special, *(f"<0x{b:02X}>" for b in range(256)), *letters]
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("1", "2"), ("▁", "▁"), ("\n", "\n")]
    vocab, merges = merged(names, pairs)
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:  # ▁ in front of the text alone, and text cut at ▁
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    elif legacy:  # ▁ in front of the text, and behind each special token
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:  # as Gemma: none in front
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *[decoders.Strip(" ", 1, 0)] * legacy])
    return finished(tokenizer, special, bos, **flags)


def finished(tokenizer: Tokenizer, special: list[str], bos: str | None, **flags: bool) -> Tokenizer:
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, **flags) for name in special]
    )
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def deberta() -> Tokenizer:
    """Unigram, as PairRM's."""
    letters = ["▁", *map(chr, range(33, 127)), "é", "▁the", "▁1", "12"]
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *letters]
    tokenizer = Tokenizer(
        models.Unigram([(n, -float(len(names) - i)) for i, n in enumerate(names)], 3)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("\n", " "), normalizers.NFC(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def _bytes(regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def _split(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(_CUT % digits), "isolated"), _bytes(False)]


def _qwen() -> Tokenizer:
    tokenizer = byte_level(_split(""), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tokenizer, the classes that published folders of its family name, and their other keys."""

    tokenizer: Callable[[], Tokenizer]
    classes: tuple[str, ...]
    config: dict[str, Any]
    template: str = CHATML


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
_IM = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_LLAMA_3 = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|im_start|>", "<|im_end|>"),
]
_GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]

# Every family of docs/models.md, by the kind of tokenizer that its checkpoints have.
KINDS = {
    "smollm": Kind(
        lambda: byte_level(
            [pre_tokenizers.Digits(individual_digits=True), _bytes(True)],
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
        ("GPT2Tokenizer", "GPT2TokenizerFast"),
        _IM | {"bos_token": "<|im_start|>"},
    ),
    "qwen": Kind(_qwen, ("Qwen2Tokenizer", "Qwen2TokenizerFast"), _IM | {"bos_token": None}),
    "llama_3_and_smollm_3": Kind(
        lambda: byte_level(_split("{1,3}"), _LLAMA_3, "<|begin_of_text|>", ignore_merges=True),
        ("PreTrainedTokenizerFast", "PreTrainedTokenizer"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"},
    ),
    "r1_distill_qwen": Kind(  # a class of another family than the tokenizer
        _qwen, ("LlamaTokenizerFast",), _IM | {"bos_token": "<|im_start|>", "legacy": True}
    ),
    "llama_2": Kind(
        lambda: sentences(["<unk>", "<s>", "</s>"], "<s>"),
        ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"),
        _LLAMA | {"legacy": False, "add_bos_token": True, "add_prefix_space": None},
        WORDS,
    ),
    "mistral_and_zephyr": Kind(
        lambda: sentences(["<unk>", "<s>", "</s>"], "<s>", metaspace=True),
        ("LlamaTokenizer", "LlamaTokenizerFast"),
        _LLAMA | {"legacy": True},
        WORDS,
    ),
    "yi": Kind(
        lambda: sentences(["<unk>", "<s>", "</s>"], "<s>", legacy=False),
        ("LlamaTokenizer",),
        _LLAMA | {"add_bos_token": False, "legacy": True},
        WORDS,
    ),
    "phi_3": Kind(
        lambda: sentences(
            ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"], "<s>", rstrip=True
        ),
        ("LlamaTokenizer", "LlamaTokenizerFast"),
        _LLAMA | {"legacy": False},
        WORDS,
    ),
    "gemma": Kind(
        lambda: sentences(_GEMMA, "<bos>", legacy=False),
        ("GemmaTokenizer", "GemmaTokenizerFast"),
        {
            "bos_token": "<bos>",
            "eos_token": "<|im_end|>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    ),
    "deberta": Kind(
        deberta,
        ("DebertaV2Tokenizer", "DebertaV2TokenizerFast"),
        {"eos_token": "[SEP]", "bos_token": "[CLS]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    ),
}  # fmt: skip


def write(folder: Path, kind: Kind, name: str, **config: Any) -> Path:
    """A folder of this kind whose tokenizer_config.json names the class; `config` is what it has
    besides."""
    folder.mkdir(parents=True, exist_ok=True)
    kind.tokenizer().save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": name, "clean_up_tokenization_spaces": True, **kind.config, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "chat_template.jinja").write_text(kind.template)
    return folder


def texts(count: int, special: list[str], seed: int = 0) -> list[str]:
    """Random texts of the characters that tokenizers treat differently."""
    draw = random.Random(seed)
    bits = [
        *(
            "\n",
            "\n\n",
            " ",
            "  ",
            "   ",
            "\t",
            "\r\n",
            "1",
            "12",
            "123",
            "2024",
            "1. ",
            ".\n",
            "é",
        ),
        *("e\u0301", "n\u0303", "Å", "A\u030a", "\u00a0", "the", " the", "The", "Hi", "'s", "'re"),
        *("▁", "Ġ", "Ċ", "☃", "漢字", "🙂", "<", "|", ">", "[/INST]", "a", ",", "-", "\u2028", ""),
        *special,
        *(f" {name}" for name in special),
        *(f"{name} " for name in special),
    ]
    return ["".join(draw.choices(bits, k=draw.randint(1, 12))) for _ in range(count)]
