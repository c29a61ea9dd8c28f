"""The authors' layout: rows worked by hand, and their code written again, slowly."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selm_jax.text.chat import ChatError
from selm_jax.text.layout import paper_ids, paper_row, truncate
from selm_jax.text.prompts import Message

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def shown(model, ids) -> str:
    return model.tokenizer.decode(list(ids))


def user(*texts: str) -> list[Message]:
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


# --- texts -------------------------------------------------------------------------------------

ROWS = {
    # of user("a") and the answer "Hi": the header is scored, EOS is written twice. (The space is
    # the one that a tokenizer of this kind puts in front of any text.)
    "zephyr": ("<s> <|user|>\na</s>\n", "<|assistant|>\nHi</s>\n</s>"),
    # BOS twice in front, once more in front of the response, and two kinds of end
    "llama_3": (
        "<|begin_of_text|>" * 2 + "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n"
        + "Hi<|eot_id|><|end_of_text|>",
    ),
    # this template writes the header without being asked, so the prompt has it
    "phi_3_may": (
        "<s><s><|user|>a<|end|><|assistant|>",
        "<s>Hi<|end|><|endoftext|>",
    ),
    # and this one ends every conversation with EOS
    "phi_3": (
        "<s><|user|>a<|end|><|endoftext|>",
        "<|assistant|>Hi<|end|><|endoftext|><|endoftext|>",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_worked_by_hand(name, chat):
    model = chat(name)
    prompt, response = paper_ids(model, user("a"), "Hi")
    both = shown(model, prompt + response)
    assert (shown(model, prompt), both.removeprefix(shown(model, prompt))) == ROWS[name]


def test_every_response_has_the_same_prompt_and_is_ended(chat):
    """A cut-off answer and an empty one too: the authors make no difference."""
    model = chat("zephyr")
    texts = {"chosen": "Hi", "rejected": "Hi H", "explore": ""}
    row = paper_row(model, user("a", "b", "c"), texts, 1024, 512)
    assert (
        shown(model, row.prompt) == "<s> <|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n"
    )
    for role, text in texts.items():
        ended = shown(model, row.prompt + row.responses[role])
        assert ended == shown(model, row.prompt) + f"<|assistant|>\n{text}</s>\n</s>"
    assert not row.prompt_cut and not row.responses_cut


@pytest.mark.parametrize("name", ["llama_2", "mistral_0_1", "gemma_2"])
def test_a_template_that_refuses_an_answer_alone(name, chat):
    with pytest.raises(ChatError, match="renders an answer alone.*layout: default.*alternate"):
        paper_ids(chat(name), user("a"), "Hi")


def test_a_tokenizer_without_bos(chat):
    with pytest.raises(ChatError, match="no BOS. Use text.layout: default"):
        paper_ids(chat("qwen_2_5"), user("a"), "Hi")


# --- the rule of truncation --------------------------------------------------------------------


def ids(count: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + count))


@pytest.mark.parametrize(
    "prompt,chosen,rejected,explore,kept",
    [  # lengths before; lengths after
        (100, 924, 10, 10, (100, 924, 10, 10)),  # 1024 in all: whole
        (100, 925, 10, 10, (100, 512, 10, 10)),  # one more: 413 tokens are lost
        (100, 10, 925, 900, (100, 10, 512, 512)),  # the explore response is cut along
        (100, 10, 10, 2000, (100, 10, 10, 2000)),  # but it is never the cause
        (600, 424, 10, 10, (600, 424, 10, 10)),
        (600, 425, 10, 10, (512, 425, 10, 10)),  # the prompt alone
        (600, 512, 10, 10, (512, 512, 10, 10)),
        (600, 513, 10, 600, (512, 512, 10, 512)),  # both
        (1500, 1, 1, 1, (512, 1, 1, 1)),
    ],
)
def test_the_rule_by_hand(prompt, chosen, rejected, explore, kept):
    row = truncate(
        ids(prompt),
        {"chosen": ids(chosen, 5000), "rejected": ids(rejected, 6000), "explore": ids(explore)},
        1024,
        512,
    )
    assert (len(row.prompt), *map(len, row.responses.values())) == kept
    assert row.prompt == ids(prompt)[-kept[0] :]  # its end
    assert row.responses["chosen"] == ids(chosen, 5000)[: kept[1]]  # their beginnings
    assert row.responses["rejected"] == ids(rejected, 6000)[: kept[2]]
    assert row.prompt_cut == (kept[0] < prompt)
    assert row.responses_cut == (kept[1:] != (chosen, rejected, explore))


# --- the authors' code, written again, slowly --------------------------------------------------


def tokenize_row(model, messages, texts, max_length, max_prompt_length):
    """One row, laid out like selm_trainer.py: each response has its own prompt, in dicts."""
    tokenizer = transformers_own(model.folder)

    def template(turns):
        turns = [{"role": m.role, "content": m.content} for m in turns]
        return tokenizer.apply_chat_template(turns, tokenize=False)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt_text = template(messages)
    answers = {}
    for role, text in texts.items():
        full = encode(prompt_text + template([Message("assistant", text)]))
        alone = encode(prompt_text)
        start = len(alone)
        if alone != full[:start]:
            start -= 1
        answers[role] = {
            "prompt": [tokenizer.bos_token_id] + full[:start],
            "answer": full[start:] + [tokenizer.eos_token_id],
        }
    longer = max(len(answers["chosen"]["answer"]), len(answers["rejected"]["answer"]))
    for each in answers.values():
        if len(each["prompt"]) + longer > max_length:
            each["prompt"] = each["prompt"][-max_prompt_length:]
    for each in answers.values():
        if len(each["prompt"]) + longer > max_length:
            each["answer"] = each["answer"][: max_length - max_prompt_length]
    return answers


@cache
def transformers_own(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


words = st.text("aHi \n.,é☃the", min_size=0, max_size=40)


@pytest.mark.parametrize("name", ROWS)
@given(
    turns=st.lists(words, min_size=1, max_size=3).filter(lambda t: len(t) % 2),
    texts=st.lists(words, min_size=3, max_size=3),
    lengths=st.tuples(st.integers(2, 120), st.integers(1, 120)).filter(lambda x: x[1] < x[0]),
)
@quick
def test_it_is_what_the_authors_code_does(name, chat, turns, texts, lengths):
    model = chat(name)
    roles = dict(zip(("chosen", "rejected", "explore"), texts, strict=True))
    expected = tokenize_row(model, user(*turns), roles, *lengths)
    row = paper_row(model, user(*turns), roles, *lengths)
    assert row.responses == {role: tuple(each["answer"]) for role, each in expected.items()}
    assert all(row.prompt == tuple(each["prompt"]) for each in expected.values())
    for role in ("chosen", "rejected"):
        assert len(row.prompt) + len(row.responses[role]) <= lengths[0]
