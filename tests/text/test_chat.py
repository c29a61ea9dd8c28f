"""Where the prompt ends and the answer begins, and how an answer ends, family by family."""

from __future__ import annotations

import datetime
import json
import shutil
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selm_jax.config import Text
from selm_jax.text.chat import Chat, ChatError, UnusableAnswer
from selm_jax.text.prompts import Message

SYSTEM = Message("system", "Be brief.")
QUIET = Text(template={"enable_thinking": False})


def pieces(chat: Chat, ids) -> list[str]:
    return chat.tokenizer.convert_ids_to_tokens(list(ids))


def shown(chat: Chat, ids) -> str:
    return chat.tokenizer.decode(list(ids))


def user(*texts: str) -> list[Message]:
    """A conversation: user, assistant, user, ..."""
    return [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


# --- the layout, spelled out -------------------------------------------------------------------

PROMPTS = {  # of user("a", "b", "c")
    "llama_2": "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]",
    "llama_3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "llama_3_2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral_0_1": "<s>[INST] a [/INST]b</s> [INST] c [/INST]",
    "mistral_0_3": "<s>[INST] a[/INST] b</s>[INST] c[/INST]",
    "zephyr": "<s> <|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\n",
    # Phi-3's special tokens swallow the line breaks behind them.
    "phi_3": "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>",
    "phi_3_may": "<s><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>",
    "qwen_2_5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen_3": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    "gemma_2": (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    ),
    "gemma_3": (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    ),
    "gemma_4": (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n"
        "<|turn>user\nc<turn|>\n<|turn>model\n"
    ),
    "smollm_2": (
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    ),
    "smollm_3": (
        "<|im_start|>system\n## Metadata\n\nToday Date: 26 July 2024\nReasoning Mode: /think\n\n"
        "## Custom Instructions\n\nYou are a helpful AI assistant.\n\n"
        "<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    ),
    "olmo_2": (
        "<|endoftext|><|user|>\na\n<|assistant|>\nb<|endoftext|>\n<|user|>\nc\n<|assistant|>\n"
    ),
    "olmo_3": (
        "<|im_start|>system\nYou are a helpful function-calling AI assistant. You do not currently "
        "have access to any functions. <functions></functions><|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    ),
    "mistral_small_3": (
        "<s>[SYSTEM_PROMPT]You are a small model, made by Mistral. Today is 2024-07-26."
        "[/SYSTEM_PROMPT][INST]a[/INST]b</s>[INST]c[/INST]"
    ),
    "phi_4": "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>",
    "granite_4": (
        "<|start_of_role|>user<|end_of_role|>a<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>b<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>c<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    ),
    "glm_4_ended": "[gMASK]<sop><|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>\n",
    "gpt_oss_final": (
        "<|start|>system<|message|>You are a small model.\nCurrent date: 2024-07-26\n\n"
        "Reasoning: medium\n\n# Valid channels: analysis, final.<|end|>"
        "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|end|>"
        "<|start|>user<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>"
    ),
    "granite_3": (
        "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\n"
        "Today's Date: July 26, 2024.\nYou are Granite.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>a<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>b<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>c<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>"
    ),
}
RESPONSES = {"llama_2": " Hi x </s>", "mistral_0_3": " Hi x</s>"}  # else "Hi x" and the end


def test_the_layout_of_every_family(family, facts, chat):
    model = chat(family)
    prompt = model.prompt_ids(user("a", "b", "c"))
    response = model.response_ids(user("a", "b", "c"), "Hi x")
    assert shown(model, prompt) == PROMPTS[family]
    rest = shown(model, prompt + response).removeprefix(PROMPTS[family])
    assert rest == RESPONSES.get(family, f"Hi x{facts.end}")


def test_the_answer_is_tokenized_as_it_stands_behind_the_header(chat):
    """There is no space in front, which this kind of tokenizer adds to any text alone."""
    zephyr = chat("zephyr")
    assert pieces(zephyr, zephyr.response_ids(user("Hi"), "Hi Hi")) == ["Hi", "▁Hi", "</s>"]
    llama = chat("llama_3")
    assert pieces(llama, llama.response_ids(user("a"), " the b\n")) == [
        *("the", "Ġ", "b", "<|eot_id|>")
    ]


# --- what holds for every template -------------------------------------------------------------

words = st.text("aHi \n.,é☃the", min_size=0, max_size=12)
answers = words.filter(str.strip)
conversations = st.lists(words, min_size=1, max_size=5).filter(lambda t: len(t) % 2)
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(texts=conversations, answer=answers)
@quick
def test_every_answer_has_exactly_one_end_token(family, facts, chat, texts, answer):
    model = chat(family)
    ids = model.response_ids(user(*texts), answer)
    assert pieces(model, ids[-1:]) == [facts.end]
    assert not set(ids[:-1]) & set(model.stop_ids)
    assert model.text(ids) == answer.strip()


@given(texts=conversations, answer=answers)
@quick
def test_prompt_and_answer_are_the_conversation(family, facts, chat, texts, answer):
    """The ids of the whole, tokenized at once, where no token spans the boundary."""
    model = chat(family)
    both = model.prompt_ids(user(*texts)) + model.response_ids(user(*texts), answer)
    whole = model.tokens(model.render(user(*texts, answer), answer_follows=False))
    if family == "zephyr":  # whose template does not write BOS
        whole = (model.tokenizer.bos_token_id, *whole)
    if answer[0].isspace():  # a token could span: see below
        assert shown(model, whole).startswith(shown(model, both).rstrip())
    else:
        assert whole[: len(both)] == both


def test_bos_stands_in_front_once_if_the_model_has_one(family, facts, chat):
    model = chat(family)
    bos = model.tokenizer.bos_token_id
    for system in ([], [SYSTEM] * facts.system):
        ids = model.prompt_ids([*system, *user("a")])
        front = next(i for i, token in enumerate(ids) if token != bos)
        assert front == facts.bos
        if family != "smollm_2":  # whose BOS opens every turn
            assert ids.count(bos) == facts.bos
    if family != "olmo_2":  # whose BOS is the end token, too
        assert bos not in model.response_ids(user("a"), "b")


def test_llama_2_opens_every_user_turn_with_bos(chat):
    ids = chat("llama_2").prompt_ids(user("a", "b", "c"))
    assert ids.count(chat("llama_2").tokenizer.bos_token_id) == 2


def test_several_turns_and_a_system_message(family, facts, chat):
    without = (
        "llama_2",
        "olmo_2",
        "mistral_small_3",
        "glm_4_ended",
        "gpt_oss_final",
    )  # there a user's turn has no end, or there is one more system message
    if not facts.system or family in without:
        pytest.skip("no system message, or no end of a user's turn")
    model = chat(family)
    mark = "<|im_end|>" if family == "olmo_3" else facts.end  # there EOS ends the last answer only
    end = model.tokenizer.convert_tokens_to_ids(mark)

    def turns(ids) -> list[str]:
        """Each turn, its end token included, and the header of the answer."""
        cuts = [0, *(i + 1 for i, token in enumerate(ids) if token == end), len(ids)]
        return [shown(model, ids[i:j]) for i, j in pairwise(cuts)]

    long = turns(model.prompt_ids([SYSTEM, *user("a", "b", "c")]))
    short = turns(model.prompt_ids([SYSTEM, *user("a")]))
    said = ["Be brief.", "a", "b", "c", ""][family == "gemma_3" :]  # one turn with the user's
    assert len(long) == len(said) and len(short) == len(said) - 2
    assert long[:-3] == short[:-1] and long[-1] == short[-1]
    for turn, content in zip(long, said, strict=True):
        assert turn.removesuffix(mark).rstrip().endswith(content)
    assert "Be brief." in long[0]


def test_a_token_that_spans_the_boundary_is_not_used(chat):
    """Line break + line break is one token here; but the prompt has ended with the first."""
    model = chat("smollm_2")
    assert pieces(model, model.prompt_ids(user("a")))[-1] == "Ċ"
    assert pieces(model, model.response_ids(user("a"), "\nb")) == ["Ċ", "b", "<|im_end|>"]


def test_the_text_of_an_answer_has_no_special_tokens(family, chat):
    ids = chat(family).response_ids(user("a"), "Hi there")
    assert chat(family).text(ids) == chat(family).text(ids[:-1]) == "Hi there"


# --- what stops a response ---------------------------------------------------------------------


def test_stop_ids_are_the_generation_configs_and_the_tokenizers(chat):
    def stops(name):
        return set(pieces(chat(name), chat(name).stop_ids))

    assert stops("llama_2") == {"</s>"}  # without a generation config
    assert stops("llama_3") == {"<|end_of_text|>", "<|eot_id|>"}
    assert stops("zephyr") == {"</s>"}
    assert stops("phi_3") == {"<|endoftext|>", "<|assistant|>", "<|end|>"}
    assert stops("gemma_2") == {"<eos>", "<end_of_turn>"}


def test_without_a_generation_config_the_models_own_end_counts(chat, tmp_path):
    """Like transformers, we read config.json only if there is no generation config."""
    folder = shutil.copytree(chat("llama_2").folder, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    own = Chat(folder).tokenizer.eos_token_id
    assert Chat(folder).stop_ids == tuple(sorted({7, 9, own}))
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 6}}))
    assert Chat(folder).stop_ids == tuple(sorted({6, own}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 8}))
    assert Chat(folder).stop_ids == tuple(sorted({8, own}))


# --- answers that cannot be used ---------------------------------------------------------------


def test_an_answer_that_spells_out_an_end_token(family, facts, chat):
    assert chat(family).spelled_ends("an end") == []
    assert chat(family).spelled_ends(f"an{facts.end}") == [facts.end]
    with pytest.raises(UnusableAnswer, match="spells out"):
        chat(family).response_ids(user("a"), f"before {facts.end} after")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_answer(family, chat, text):
    with pytest.raises(UnusableAnswer, match="the answer is empty"):
        chat(family).response_ids(user("a"), text)


# --- templates that cannot be used -------------------------------------------------------------


def test_a_template_that_does_not_keep_the_prompt_is_shown_both_ways(chat):
    chat("always_thinking").prompt_ids(user("a"))
    with pytest.raises(ChatError, match=r"prompt:.*<think>(.|\n)*conversation:.*assistant\\nb"):
        chat("always_thinking").response_ids(user("a"), "b")


def test_mistral_0_3_forgets_the_system_message_when_the_answer_is_there(chat):
    prompt = chat("mistral_0_3").prompt_ids([SYSTEM, *user("a")])
    assert "Be brief." in shown(chat("mistral_0_3"), prompt)
    with pytest.raises(ChatError, match="does not keep the prompt"):
        chat("mistral_0_3").response_ids([SYSTEM, *user("a")], "b")
    with pytest.raises(ChatError, match="omits the system message 'Be brief.'"):
        chat("mistral_0_3").conversation_ids([SYSTEM, *user("a")], "b")


def test_a_whole_conversation_is_all_that_the_template_writes(chat):
    """A reward model reads BOS once, and also the text after the end token."""
    for family in ("smollm_2", "llama_3", "gemma_2"):
        ids = chat(family).conversation_ids(user("a"), "b")
        before = chat(family).prompt_ids(user("a"))
        answer = chat(family).response_ids(user("a"), "b")
        both = (*before, *answer)
        assert ids[: len(both)] == both
        behind = shown(chat(family), ids[len(both) :])
        assert behind.strip() == "" and (behind == "") == (family == "llama_3")


def test_a_think_block_that_the_data_does_not_have_is_not_trained_on(chat):
    thinking = chat("qwen_3", Text())
    with pytest.raises(ChatError, match=r"puts more in front of it(.|\n)*enable_thinking"):
        thinking.response_ids(user("a"), "b")
    with_thought = thinking.response_ids(user("a"), "<think>\nso\n</think>\n\nb")
    assert shown(thinking, with_thought) == "<think>\nso\n</think>\n\nb<|im_end|>"
    for name, block in (
        ("qwen_3", "<think>\n\n</think>\n\n"),
        ("smollm_3", "<think>\n\n</think>\n"),
    ):
        quiet = chat(name, QUIET)
        assert shown(quiet, quiet.prompt_ids(user("a"))).endswith(f"assistant\n{block}")
        assert shown(quiet, quiet.response_ids(user("a"), "b")) == "b<|im_end|>"


@pytest.mark.parametrize("name", ["gemma_2", "mistral_0_1"])
def test_a_template_that_refuses_a_system_message(name, chat):
    with pytest.raises(ChatError) as error:
        chat(name).prompt_ids([SYSTEM, *user("a")])
    said = "System role not supported" if name == "gemma_2" else "must alternate"
    for part in (said, "of system, user", "without the system message", "data.system"):
        assert part in str(error.value)


def test_a_template_that_refuses_an_order_of_turns(chat):
    with pytest.raises(ChatError, match=r"user, user: .*must alternate.*order"):
        chat("llama_2").prompt_ids([*user("a"), *user("b")])


def test_a_system_message_that_the_template_leaves_out(chat):
    with pytest.raises(ChatError, match="omits the system message 'Be brief.'"):
        chat("phi_3_may").prompt_ids([SYSTEM, *user("a")])


def test_a_system_message_that_the_template_reads_or_has_anyway(chat):
    quiet = chat("smollm_3").prompt_ids([Message("system", "/no_think"), *user("a")])
    assert "Mode: /no_think" in shown(chat("smollm_3"), quiet)
    own = Message("system", "You are a helpful AI assistant.")
    smollm = chat("smollm_2")
    assert smollm.prompt_ids([own, *user("a")]) == smollm.prompt_ids(user("a"))
    assert smollm.prompt_ids([Message("system", " "), *user("a")])


def test_a_template_without_an_end(chat):
    with pytest.raises(ChatError, match="does not end an answer"):
        chat("endless").response_ids(user("a"), "b")


def test_an_end_that_the_generation_config_does_not_know(chat):
    """As in the first generation_config.json of Gemma 2."""
    with pytest.raises(
        ChatError, match=r"does not end.*<eos>.*eos_token_id in .*generation_config"
    ):
        chat("gemma_2_first").response_ids(user("a"), "b")


def test_a_template_that_writes_bos_twice(chat):
    with pytest.raises(ChatError, match=r"<s> twice.*Remove one of them"):
        chat("bos_twice").prompt_ids(user("a"))


@pytest.mark.parametrize(
    ("name", "message"), [("no_template", "no chat template"), ("no_end", "EOS")]
)
def test_a_folder_that_lacks_something_is_named(name, message, chat):
    with pytest.raises(ChatError, match=rf"{name}\d.*{message}"):
        chat(name)


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(ChatError, match=r"no tokenizer"):
        Chat(tmp_path)


# --- what a template reads besides the messages ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "day"), [("llama_3_2", "05 Jun 2023"), ("smollm_3", "05 June 2023")]
)
def test_the_day_is_the_experiments_not_todays(name, day, chat):
    date = datetime.date(2023, 6, 5)
    model = chat(name, Text(date=date))
    assert f"Today Date: {day}" in shown(model, model.prompt_ids(user("a")))


@pytest.mark.parametrize(
    ("variable", "message"),
    [("enable_thinkng", "never reads"), ("messages", "cannot set"), ("tools", "cannot set")],
)
def test_a_variable_that_the_template_does_not_read(variable, message, chat):
    with pytest.raises(ChatError, match=f"text.template .*{message}"):
        chat("qwen_3", Text(template={variable: False}))


# --- the real one ------------------------------------------------------------------------------


def test_the_real_smollm2(real_model):
    model = Chat(real_model)
    ids = model.prompt_ids(user("What is the capital of France?"))
    assert shown(model, ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    answer = model.response_ids(user("What is the capital of France?"), "Paris.")
    assert pieces(model, answer) == ["Paris", ".", "<|im_end|>"]
    assert model.stop_ids == (2,)


# --- what a model's folder must fulfil, with whatever data -------------------------------------


def with_template(folder, tmp_path, source: str) -> Chat:
    made = shutil.copytree(folder, tmp_path / "model", dirs_exist_ok=True)
    (made / "chat_template.jinja").write_text(source)
    return Chat(made)


def test_a_made_up_answer_begins_and_ends_in_every_family(family, chat):
    chat(family).check_made_up()


@pytest.mark.parametrize("name", ["always_thinking", "qwen_3", "gpt_oss", "gemma_4"])
def test_a_template_that_thinks_serves_where_only_the_policy_answers(name, chat):
    """It works although no answer of a dataset can follow its header."""
    thinking = chat(name, Text(date=Text().date))
    thinking.check_made_up()
    with pytest.raises(ChatError):
        thinking.response_ids(user("a"), "b")


def test_a_template_without_a_header_begins_no_answer(chat, tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    headless = with_template(chat("smollm_2").folder, tmp_path, source)
    with pytest.raises(ChatError, match=r"does not begin an answer(.|\n)*add_generation_prompt"):
        headless.check_made_up()


@pytest.mark.parametrize("name", ["gemma_2_first", "endless", "glm_4"])
def test_a_turn_that_ends_with_no_stop_token(name, chat):
    """The policy would go on with a user's turn of its own."""
    with pytest.raises(ChatError, match=r"does not end an answer with one of the stop tokens"):
        chat(name).check_made_up()


def test_a_template_that_leaves_answers_out(chat, tmp_path):
    deaf = with_template(chat("smollm_2").folder, tmp_path, "{{ messages[0].content }}<|im_end|>")
    with pytest.raises(ChatError, match="omits the answer"):
        deaf.check_made_up()


# --- one BOS -----------------------------------------------------------------------------------

OPENINGS = ["\n{{ bos_token }}", " {{ bos_token }}", "Hi.{{ bos_token }}", "{{ bos_token }}"]
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("said", ["a", "<s>", "<s> a <s>"])
def test_a_template_that_writes_its_bos_gets_no_other(opening, said, chat, tmp_path):
    """BOS is not added even if the template writes it after other text; servers do the same."""
    model = with_template(chat("zephyr").folder, tmp_path, opening + TURNS)
    rendered = model.render(user(said), answer_follows=True)
    assert model.prompt_ids(user(said)) == model.tokens(rendered)
    assert model.prompt_ids(user("a")).count(model.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("said", ["a", "a <s>", "<s> a"])
def test_a_bos_that_a_message_spells_is_not_the_templates(said, chat):
    """Zephyr's template does not write BOS, so it is added."""
    model = chat("zephyr")
    bos = model.tokenizer.bos_token_id
    assert model.prompt_ids(user(said)) == (
        bos,
        *model.tokens(model.render(user(said), answer_follows=True)),
    )
