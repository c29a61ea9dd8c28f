"""The data's answers: what cannot be used is found early, and named."""

from __future__ import annotations

import pytest

from selm_jax.config import Text
from selm_jax.text.answers import answer_ids, answers, check_answers
from selm_jax.text.chat import ChatError, UnusableAnswer
from selm_jax.text.prompts import Message, Prompt


def prompt(name: str, *texts: str, chosen="Yes", rejected="No", system: bool = False) -> Prompt:
    turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Prompt(name, (*[Message("system", "Be brief.")] * system, *turns), chosen, rejected)


def check(chat, prompts, layout="default", on_bad_row="error"):
    check_answers(chat, prompts, layout=layout, on_bad_row=on_bad_row)


def test_answers_are_those_that_are_there():
    assert answers(prompt("p", "a")) == {"chosen": "Yes", "rejected": "No"}
    assert answers(prompt("p", "a", chosen=None, rejected=None)) == {}


def test_an_answer_is_a_response_or_an_error_with_its_name(family, facts, chat):
    model = chat(family)
    good = prompt("p", "a", rejected=f"b{facts.end}")
    assert answer_ids(model, good, "chosen") == model.response_ids(good.messages, "Yes")
    with pytest.raises(UnusableAnswer, match=r"prompt p, rejected: .*spells out(.|\n)*on_bad_row"):
        answer_ids(model, good, "rejected")


def test_usable_answers_pass(family, facts, chat):
    rows = [prompt("p", "a"), prompt("q", "a", "b", "c"), prompt("r", "a", system=facts.system)]
    check(chat(family), rows)


def test_end_tokens_are_found_in_every_row_unless_bad_rows_are_dropped(chat):
    rows = [prompt(f"p{i}", "a") for i in range(9)] + [prompt("last", "a", chosen="b</s>")]
    with pytest.raises(UnusableAnswer, match="prompt last, chosen"):
        check(chat("zephyr"), rows)
    check(chat("zephyr"), rows, on_bad_row="drop")
    check(chat("zephyr"), rows, layout="paper")  # the authors do not mind


def test_the_layout_is_tried_with_every_sequence_of_roles(chat):
    rows = [prompt("p", "a"), prompt("q", "a", "b", "c"), prompt("r", "a", system=True)]
    check(chat("mistral_0_3"), rows[:2])
    for policy in ("error", "drop"):  # a template that does not serve is not a bad row
        with pytest.raises(ChatError, match="prompt r, with the answer"):
            check(chat("mistral_0_3"), rows, on_bad_row=policy)
        with pytest.raises(ChatError, match=r"prompt p(.|\n)*enable_thinking"):
            check(chat("qwen_3", Text(date=Text().date)), rows, on_bad_row=policy)


def test_the_papers_layout_is_tried_too(chat):
    check(chat("llama_3"), [prompt("p", "a")], layout="paper")
    with pytest.raises(ChatError, match="prompt p.*answer alone"):
        check(chat("gemma_2"), [prompt("p", "a")], layout="paper")
