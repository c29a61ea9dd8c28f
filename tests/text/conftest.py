"""Chat models of every family without the weights: tiny tokenizers, templates in `templates/`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from selm_jax.config import Text
from selm_jax.text.chat import Chat

TEMPLATES = Path(__file__).parent / "templates"


def byte_level(specials: list[str], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE with a few merges, among them line break + line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ")]
    words = alphabet + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, specials, bos)


def sentencepiece_like(
    specials: list[str], bos: str | None = None, *, prefix: bool = True, rstrip: bool = False
) -> Tokenizer:
    """As Llama-2's and Mistral's: ▁ for a space, and one more in front of any text.

    Gemma's puts none in front (prefix=False); Phi-3's special tokens swallow the white space that
    follows them (rstrip=True).
    """
    letters = [chr(i) for i in range(33, 127)] + ["▁"]
    merges = [("▁", "H"), ("▁H", "i"), ("H", "i")]
    words = letters + [f"<0x{i:02X}>" for i in range(256)] + [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, byte_fallback=True, fuse_unk=True)
    )
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return _finish(tokenizer, specials, bos, rstrip=rstrip)


def _finish(tokenizer: Tokenizer, specials, bos: str | None, rstrip: bool = False) -> Tokenizer:
    """Adds special tokens (or ordinary added tokens if they end with ~), and BOS to every text."""
    for name in specials:
        token, special = name.removesuffix("~"), not name.endswith("~")
        swallows = rstrip and token not in ("<s>", "</s>", "<|endoftext|>")
        added = AddedToken(token, special=special, normalized=False, rstrip=swallows)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def llama_3() -> Tokenizer:
    return byte_level(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"], bos="<|begin_of_text|>",
    )  # fmt: skip


def gemma() -> Tokenizer:
    return sentencepiece_like(
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], bos="<bos>", prefix=False
    )


def gemma_4() -> Tokenizer:
    thoughts = ["<|think|>", "<|channel>", "<channel|>"]
    return sentencepiece_like(
        ["<bos>", "<eos>", "<|turn>", "<turn|>", *thoughts], bos="<bos>", prefix=False
    )


def phi_3(bos: str | None = None) -> Tokenizer:
    return sentencepiece_like(
        ["<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"],
        bos, rstrip=True,
    )  # fmt: skip


def glm_4() -> Tokenizer:
    turns = ["<|system|>", "<|user|>", "<|assistant|>"]
    return byte_level(["[gMASK]", "<sop>", *turns, "<|endoftext|>"])


def gpt_oss() -> Tokenizer:
    turns = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
    return byte_level(["<|startoftext|>", "<|endoftext|>", *turns])


@dataclasses.dataclass(frozen=True)
class Family:
    """A tokenizer, the names of its special tokens, and the correct layout of its turns.

    `bos` counts the BOS tokens in front of a prompt; `stops` is the generation config's
    eos_token_id; `settings` are what an experiment needs for answers from a data set.
    """

    tokenizer: Callable[[], Tokenizer]
    names: Mapping[str, str]
    end: str = "</s>"
    stops: str | list[str] | None = None
    bos: int = 1
    system: bool = True
    template: str | None = ""  # a file of templates/; "" is the family's own name
    settings: Text = Text()  # noqa: RUF009 (it is frozen)


LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
PHI = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>"}
GPT_OSS = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"}
PHI_STOPS = ["<|endoftext|>", "<|assistant|>", "<|end|>"]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINKING = Text(template={"enable_thinking": True})
QUIET = Text(template={"enable_thinking": False})

FAMILIES = {
    "llama_2": Family(lambda: sentencepiece_like(["<s>", "</s>"], "<s>"), LLAMA),
    "llama_3": Family(llama_3, LLAMA_3, "<|eot_id|>", ["<|end_of_text|>", "<|eot_id|>"]),
    "llama_3_2": Family(llama_3, LLAMA_3, "<|eot_id|>", ["<|end_of_text|>", "<|eot_id|>"]),
    "mistral_0_1": Family(
        lambda: sentencepiece_like(["<s>", "</s>"], "<s>"), LLAMA, stops="</s>", system=False
    ),
    "mistral_0_3": Family(
        lambda: sentencepiece_like(["<s>", "</s>", "[INST]", "[/INST]"], "<s>"), LLAMA,
        stops="</s>", system=False,
    ),
    "mistral_small_3": Family(
        lambda: byte_level(
            ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
        ),
        LLAMA, stops="</s>",
    ),
    "zephyr": Family(lambda: sentencepiece_like(["<s>", "</s>"], "<s>"), LLAMA, stops="</s>"),
    "phi_3": Family(phi_3, PHI, "<|end|>", PHI_STOPS, bos=0),
    "phi_3_may": Family(lambda: phi_3("<s>"), PHI, "<|end|>", PHI_STOPS, system=False),
    "qwen_2_5": Family(
        lambda: byte_level(CHATML_TOKENS), QWEN, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"], 0
    ),
    "qwen_3": Family(
        lambda: byte_level([*CHATML_TOKENS, "<think>~", "</think>~"]), QWEN, "<|im_end|>",
        ["<|im_end|>", "<|endoftext|>"], 0, settings=QUIET,
    ),
    "gemma_2": Family(gemma, GEMMA, "<end_of_turn>", ["<eos>", "<end_of_turn>"], system=False),
    "gemma_3": Family(gemma, GEMMA, "<end_of_turn>", ["<eos>", "<end_of_turn>"]),
    "gemma_4": Family(gemma_4, GEMMA, "<turn|>", ["<eos>", "<turn|>"], settings=THINKING),
    "smollm_2": Family(lambda: byte_level(CHATML_TOKENS), CHATML, "<|im_end|>", "<|im_end|>"),
    "smollm_3": Family(lambda: byte_level(CHATML_TOKENS), QWEN, "<|im_end|>", bos=0),
    "olmo_2": Family(
        lambda: byte_level(["<|endoftext|>"]),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, "<|endoftext|>",
    ),
    "olmo_3": Family(
        lambda: byte_level(CHATML_TOKENS), {"eos_token": "<|endoftext|>"}, "<|endoftext|>",
        ["<|im_end|>", "<|endoftext|>"], 0,
    ),
    "phi_4": Family(
        lambda: byte_level(["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"]),
        {"eos_token": "<|endoftext|>"}, "<|end|>", ["<|end|>", "<|endoftext|>"], 0,
    ),
    "granite_4": Family(
        lambda: byte_level(["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]),
        {"eos_token": "<|end_of_text|>"}, "<|end_of_text|>", bos=0,
    ),
    "glm_4_ended": Family(
        glm_4, {"eos_token": "<|user|>"}, "<|user|>", ["<|endoftext|>", "<|user|>"], 0
    ),
    "gpt_oss_final": Family(
        gpt_oss, GPT_OSS, "<|return|>", ["<|return|>", "<|endoftext|>"], 0
    ),
    "granite_3": Family(
        lambda: byte_level(["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]),
        {"eos_token": "<|end_of_text|>"}, "<|end_of_text|>", bos=0,
    ),
}  # fmt: skip
BROKEN = {
    "always_thinking": Family(lambda: byte_level(CHATML_TOKENS), CHATML),
    "glm_4": Family(glm_4, {"eos_token": "<|user|>"}, stops="<|user|>"),
    "gpt_oss": Family(gpt_oss, GPT_OSS),
    "endless": Family(lambda: byte_level(["</s>"]), {"eos_token": "</s>"}),
    "bos_twice": Family(lambda: byte_level(["<s>", "</s>"], bos="<s>"), LLAMA),
    "no_template": Family(lambda: byte_level(["</s>"]), {"eos_token": "</s>"}, template=None),
    "no_end": Family(lambda: byte_level(["<s>"]), {"bos_token": "<s>"}, template="zephyr"),
    "gemma_2_first": Family(gemma, GEMMA, stops="<eos>", template="gemma_2"),
}


def write(folder: Path, name: str) -> Path:
    """Writes the files of a model folder that `Chat` reads."""
    family = (FAMILIES | BROKEN)[name]
    tokenizer = family.tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **family.names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if family.template is not None:
        template = (TEMPLATES / f"{family.template or name}.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template)
    if stops := family.stops:
        ids = [tokenizer.token_to_id(s) for s in ([stops] if isinstance(stops, str) else stops)]
        stop = ids[0] if isinstance(stops, str) else ids
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    return folder


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> Callable[..., Chat]:
    """`chat(name)` as the family needs it, or `chat(name, settings)`."""

    @cache
    def folder(name: str) -> Path:
        return write(tmp_path_factory.mktemp(name), name)

    @cache
    def usual(name: str) -> Chat:
        return Chat(folder(name), (FAMILIES | BROKEN)[name].settings)

    return lambda name, settings=None: Chat(folder(name), settings) if settings else usual(name)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def facts(family) -> Family:
    return FAMILIES[family]
