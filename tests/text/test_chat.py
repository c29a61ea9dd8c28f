"""Where the prompt ends and the answer begins, and how an answer ends, template by template."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from selm_jax.text.chat import Chat, ChatError
from selm_jax.text.prompts import Message

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Its blocks keep the line breaks around them, as in the model's own file.
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "eos_token + '\n' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
# Like some thinking models': what the prompt ends with is not how an answer begins.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)


def byte_level(specials: list[str], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE with a few merges, among them line break + line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ")]
    words = alphabet + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def sentencepiece_like(specials: list[str], bos: str) -> Tokenizer:
    """As Llama-2's and Mistral's: ▁ for a space, and one more in front of any text."""
    letters = [chr(i) for i in range(33, 127)] + ["▁"]
    merges = [("▁", "H"), ("▁H", "i"), ("H", "i")]
    words = letters + [f"<0x{i:02X}>" for i in range(256)] + [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


FAMILIES: dict[str, Callable[[], tuple[Tokenizer, dict, str | None, object]]] = {
    # tokenizer, names of its special tokens, template, eos_token_id of generation_config.json
    "smollm2": lambda: (
        byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, SMOLLM2, "<|im_end|>",
    ),
    "llama-3": lambda: (
        byte_level(
            ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"], bos="<|begin_of_text|>",
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, LLAMA_3,
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "zephyr": lambda: (
        sentencepiece_like(["<s>", "</s>"], bos="<s>"),
        {"bos_token": "<s>", "eos_token": "</s>"}, ZEPHYR, "</s>",
    ),
    "phi-3": lambda: (
        byte_level(["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"]),
        {"eos_token": "<|endoftext|>"}, PHI_3, ["<|endoftext|>", "<|end|>"],
    ),
    "forgetful": lambda: (
        byte_level(["<|im_start|>", "<|im_end|>"]),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, FORGETFUL, None,
    ),
    "endless": lambda: (byte_level(["</s>"]), {"eos_token": "</s>"}, ENDLESS, None),
    "twice": lambda: (
        byte_level(["<s>", "</s>"], bos="<s>"), {"bos_token": "<s>", "eos_token": "</s>"},
        "{{ bos_token }}" + "{{ bos_token }}" + ZEPHYR, None,
    ),
    "no template": lambda: (byte_level(["</s>"]), {"eos_token": "</s>"}, None, None),
    "no end": lambda: (byte_level(["<s>"]), {"bos_token": "<s>"}, ZEPHYR, None),
}  # fmt: skip
CHATS = ("smollm2", "llama-3", "zephyr", "phi-3")
END = {"smollm2": "<|im_end|>", "llama-3": "<|eot_id|>", "zephyr": "</s>", "phi-3": "<|end|>"}


def write(folder: Path, family: str) -> Path:
    tokenizer, names, template, stops = FAMILIES[family]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    if stops:
        each = [stops] if isinstance(stops, str) else stops
        ids = [tokenizer.token_to_id(s) for s in each]
        stop = ids[0] if isinstance(stops, str) else ids
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    return {family: Chat(write(folder / family, family)) for family in CHATS}


def pieces(chat: Chat, ids) -> list[str]:
    return chat.tokenizer.convert_ids_to_tokens(list(ids))


def user(*texts: str) -> list[Message]:
    """A conversation: user, assistant, user, ..."""
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


# --- the layout, spelled out -------------------------------------------------------------------


def test_smollm2(chats):
    chat = chats["smollm2"]
    prompt, answer = chat.prompt_ids(user("a")), chat.response_ids(user("a"), "the b")
    assert "".join(pieces(chat, prompt)).replace("Ġ", " ").replace("Ċ", "\n") == (
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    assert pieces(chat, answer) == ["the", "Ġ", "b", "<|im_end|>"]


def test_llama_3(chats):
    chat = chats["llama-3"]
    prompt, answer = chat.prompt_ids(user("a")), chat.response_ids(user("a"), " the b\n")
    head = ["<|start_header_id|>", *"user", "<|end_header_id|>", "ĊĊ", "a", "<|eot_id|>"]
    tail = ["<|start_header_id|>", *"assistant", "<|end_header_id|>", "ĊĊ"]
    assert pieces(chat, prompt) == ["<|begin_of_text|>", *head, *tail]
    assert pieces(chat, answer) == ["the", "Ġ", "b", "<|eot_id|>"]


def test_zephyr(chats):
    """The template writes no BOS, so the tokenizer's own is put in front; `\\n` after `</s>` goes.

    The answer begins with the line break after the header: without the space that a tokenizer of
    this kind puts in front of any text that it sees alone.
    """
    chat = chats["zephyr"]
    prompt, answer = chat.prompt_ids(user("Hi")), chat.response_ids(user("Hi"), "Hi Hi")
    assert pieces(chat, prompt) == [
        "<s>", "▁", *"<|user|>", "<0x0A>", "Hi", "</s>", "<0x0A>", *"<|assistant|>",
    ]  # fmt: skip
    assert pieces(chat, answer) == ["<0x0A>", "Hi", "▁Hi", "</s>"]


def test_phi_3(chats):
    """The whole conversation ends with a second end token, which no answer has."""
    chat = chats["phi-3"]
    assert pieces(chat, chat.response_ids(user("a"), "b")) == ["b", "<|end|>"]
    assert chat.prompt_ids(user("a"))[0] == chat.tokenizer.convert_tokens_to_ids("<|user|>")


# --- what holds for every template -------------------------------------------------------------

words = st.text("aHi \n.,é☃the", min_size=0, max_size=12)


@pytest.mark.parametrize("family", CHATS)
def test_every_answer_has_exactly_one_end_token(family, chats):
    chat = chats[family]
    end = chat.tokenizer.convert_tokens_to_ids(END[family])

    @given(st.lists(words, min_size=1, max_size=5).filter(lambda t: len(t) % 2), words)
    @settings(max_examples=60, deadline=None)
    def check(texts, answer):
        ids = chat.response_ids(user(*texts), answer)
        assert ids[-1] == end
        assert not set(ids[:-1]) & set(chat.stop_ids)
        assert chat.text(ids) == answer.strip()

    check()


@pytest.mark.parametrize("family", CHATS)
def test_prompt_and_answer_are_the_conversation(family, chats):
    """The ids of the whole, tokenized at once, where no token spans the boundary; and BOS once."""
    chat = chats[family]
    bos = chat.tokenizer.bos_token_id

    @given(st.lists(words, min_size=1, max_size=5).filter(lambda t: len(t) % 2), words)
    @settings(max_examples=60, deadline=None)
    def check(texts, answer):
        both = chat.prompt_ids(user(*texts)) + chat.response_ids(user(*texts), answer)
        if family in ("llama-3", "zephyr"):
            assert both[0] == bos and both.count(bos) == 1
        if family == "zephyr":  # whose template does not write it
            both = both[1:]
        whole = chat.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in user(*texts, answer)], tokenize=False
        )
        ids = tuple(chat.tokenizer(whole, add_special_tokens=False)["input_ids"])
        if answer.startswith("\n") and family in ("smollm2", "phi-3"):  # spans: see below
            assert chat.tokenizer.decode(ids).startswith(chat.tokenizer.decode(both))
        else:
            assert ids[: len(both)] == both

    check()


@pytest.mark.parametrize("family", CHATS)
def test_several_turns_and_a_system_message(family, chats):
    chat = chats[family]
    end = chat.tokenizer.convert_tokens_to_ids(END[family])

    def turns(ids):
        """The ids of each turn, its end token included, and the header of the answer."""
        cuts = [0, *(i + 1 for i, token in enumerate(ids) if token == end), len(ids)]
        return [ids[i:j] for i, j in pairwise(cuts)]

    system = Message("system", "Be brief.")
    long = turns(chat.prompt_ids([system, *user("a", "b", "c")]))
    short = turns(chat.prompt_ids([system, *user("a")]))
    assert len(long) == 5 and len(short) == 3
    assert long[:2] == short[:2] and long[-1] == short[-1]
    texts = [chat.tokenizer.decode(ids) for ids in long]
    said = ("Be brief.", "a", "b", "c", "")
    roles = ("system", "user", "assistant", "user", "assistant")
    for text, role, content in zip(texts, roles, said, strict=True):
        head, _, tail = text.partition(role)
        assert head + role + tail == text and tail.removesuffix(END[family]).endswith(content)


def test_a_token_that_spans_the_boundary_is_not_used(chats):
    """Line break + line break is one token here; but the prompt has ended with the first."""
    chat = chats["smollm2"]
    assert pieces(chat, chat.prompt_ids(user("a")))[-1] == "Ċ"
    assert pieces(chat, chat.response_ids(user("a"), "\nb")) == ["Ċ", "b", "<|im_end|>"]


def test_the_text_of_an_answer_has_no_special_tokens(chats):
    for family, chat in chats.items():
        ids = chat.response_ids(user("a"), "Hi there")
        assert chat.text(ids) == chat.text(ids[:-1]) == "Hi there", family


# --- what stops a response ---------------------------------------------------------------------


def test_stop_ids_are_the_generation_configs_and_the_tokenizers(chats):
    stops = {family: set(pieces(chat, chat.stop_ids)) for family, chat in chats.items()}
    assert stops == {
        "smollm2": {"<|im_end|>"},
        "llama-3": {"<|end_of_text|>", "<|eot_id|>"},
        "zephyr": {"</s>"},
        "phi-3": {"<|endoftext|>", "<|end|>"},
    }


@pytest.mark.parametrize("family", CHATS)
def test_an_answer_that_spells_out_an_end_token_is_an_error(family, chats):
    with pytest.raises(ChatError, match="spells out"):
        chats[family].response_ids(user("a"), f"before {END[family]} after")


# --- what cannot be used -----------------------------------------------------------------------


def test_a_template_that_does_not_keep_the_prompt_is_shown_both_ways(tmp_path):
    chat = Chat(write(tmp_path, "forgetful"))
    chat.prompt_ids(user("a"))
    with pytest.raises(ChatError, match=r"prompt:.*<think>(.|\n)*conversation:.*assistant\\nb"):
        chat.response_ids(user("a"), "b")


def test_a_template_without_an_end_is_an_error(tmp_path):
    chat = Chat(write(tmp_path, "endless"))
    with pytest.raises(ChatError, match="does not end an answer"):
        chat.response_ids(user("a"), "b")


def test_a_template_that_writes_bos_twice_is_an_error(tmp_path):
    chat = Chat(write(tmp_path, "twice"))
    with pytest.raises(ChatError, match="<s> twice"):
        chat.prompt_ids(user("a"))


@pytest.mark.parametrize(
    ("family", "message"), [("no template", "no chat template"), ("no end", "EOS")]
)
def test_a_folder_that_lacks_something_is_named(family, message, tmp_path):
    with pytest.raises(ChatError, match=rf"{tmp_path}.*{message}"):
        Chat(write(tmp_path, family))


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(ChatError, match=r"no tokenizer"):
        Chat(tmp_path)


# --- the real one ------------------------------------------------------------------------------


def test_the_real_smollm2(real_model):
    chat = Chat(real_model)
    ids = chat.prompt_ids(user("What is the capital of France?"))
    assert chat.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    answer = chat.response_ids(user("What is the capital of France?"), "Paris.")
    assert pieces(chat, answer) == ["Paris", ".", "<|im_end|>"]
    assert chat.stop_ids == (2,)
