"""Reward models as rankers, against transformers on the same folders."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker
from selm_jax.models.config import UnsupportedModel
from selm_jax.parallel.mesh import make_mesh
from selm_jax.text.prompts import Message
from selm_jax.weights.huggingface import WeightsError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ATOL = 1e-4
NEWLINE, END = 200, 1  # of the tiny tokenizer; the template ends with the one behind the other
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 24}),
    "phi3": ("Phi3Config", {"sliding_window": 40}),
}
TEXTS = [
    "",
    "Yes.",
    "No.",
    "Yes.",
    "A river runs. " * 9,
    "\n",
    "Say <|im_end|>\n again",
    "soup " * 40,
]


def question(text: str, id: str = "p", *before: tuple[str, str]) -> Question:
    messages = (*(Message(*turn) for turn in before), Message("user", text))
    return Question(text, messages, {}, id)


QUESTIONS = [
    question("Praise a river in one line.", "p0"),
    question("And a chair?", "p1", ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello.")),
    question("Explain soup. " * 12, "p2"),
    question("Nothing to compare?", "p3"),
]
CANDIDATES = [TEXTS, TEXTS[1:4], TEXTS[::-1], []]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(family, pad) -> a folder as transformers saves it, and its torch model."""

    @cache
    def made(family: str, pad: int | None = 0):
        folder = tiny.make_model(tmp_path_factory.mktemp(family) / "model")
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        (folder / "model.safetensors").unlink()
        kind, own = FAMILIES[family]
        config = getattr(transformers, kind)(
            **(SIZES | {"vocab_size": vocab + 8, "pad_token_id": pad, "num_labels": 1} | own)
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(
            config, attn_implementation="eager"
        )
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        model.eval().save_pretrained(folder)
        return folder, model

    return made


def conversations(
    folder: Path, questions=QUESTIONS, candidates=CANDIDATES
) -> list[list[list[int]]]:
    """Token ids as transformers' own call gives them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [
        [
            tokenizer.apply_chat_template(
                [
                    *({"role": m.role, "content": m.content} for m in q.messages),
                    {"role": "assistant", "content": text},
                ],
                return_dict=False,
            )
            for text in texts
        ]
        for q, texts in zip(questions, candidates, strict=True)
    ]


def theirs(model, ids: list[list[int]], side: str | None = None, pad: int = 0) -> np.ndarray:
    """Scores of transformers: one by one, or as one batch with padding on one side."""
    if side is None:
        return np.array([theirs(model, [each], "right", pad)[0] for each in ids])
    time = max(map(len, ids))
    rows, mask = np.full((len(ids), time), pad), np.zeros((len(ids), time), int)
    for i, each in enumerate(ids):
        at = slice(0, len(each)) if side == "right" else slice(time - len(each), time)
        rows[i, at], mask[i, at] = each, 1
    with torch.no_grad():
        found = model(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits
    return found[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(family, make, record_property):
    folder, model = make(family)
    found = build_ranker("reward_model", source=str(folder)).scores(QUESTIONS, CANDIDATES)
    assert [len(each) for each in found] == [8, 3, 8, 0]
    ours = np.concatenate(found)
    ids = [each for texts in conversations(folder) for each in texts]
    expected = theirs(model, ids)
    assert expected.std() > 0.1
    difference = np.abs(ours - expected).max()
    record_property("reward_model_parity", (family, float(difference)))
    assert difference < ATOL
    for side in ("left", "right"):
        np.testing.assert_allclose(ours, theirs(model, ids, side), atol=ATOL)


@pytest.mark.parametrize("pad", [NEWLINE, END, None])
def test_the_pad_token_is_passed_over_where_it_ends_a_text_too(pad, make):
    """If texts end with the pad token, transformers reads the score before it, and so must we."""
    folder, model = make("llama", pad)
    ids = [each for texts in conversations(folder) for each in texts]
    assert all(each[-2:] == [END, NEWLINE] for each in ids)
    ours = np.concatenate(
        build_ranker("reward_model", source=str(folder)).scores(QUESTIONS, CANDIDATES)
    )
    np.testing.assert_allclose(ours, theirs(model, ids, pad=pad or 0), atol=ATOL)
    if pad is not None:
        for side in ("left", "right"):
            np.testing.assert_allclose(ours, theirs(model, ids, side, pad), atol=ATOL)
    try:  # what they would be if nothing ended with the pad token
        model.config.pad_token_id = 2
        elsewhere = theirs(model, ids)
    finally:
        model.config.pad_token_id = pad
    assert (np.abs(ours - elsewhere).max() > 0.1) == (pad == NEWLINE)


def test_no_neighbour_batch_or_mesh_changes_a_score(make, monkeypatch):
    folder, _ = make("gemma2")  # whose layers' windows are another way to see too much
    ranker = build_ranker("reward_model", source=str(folder))
    whole = ranker.scores(QUESTIONS, CANDIDATES)
    assert whole[0][1] == whole[0][3]  # equal texts, to the bit
    for other in (
        build_ranker("reward_model", source=str(folder), batch=1),
        build_ranker("reward_model", source=str(folder), data=2, fsdp=2, tensor=2),
    ):
        for a, b in zip(whole, other.scores(QUESTIONS, CANDIDATES), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    backwards = ranker.scores(QUESTIONS[::-1], CANDIDATES[::-1])[::-1]
    for a, b in zip(whole, backwards, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for text, score in zip(CANDIDATES[0], whole[0], strict=True):
        ((own,),) = ranker.scores(QUESTIONS[:1], [[text]])
        assert abs(own - score) < 1e-5
    # Trees of few tokens, so that a question's answers come in several.
    monkeypatch.setattr("selm_jax.feedback.models.reward_model.TOGETHER", 64)
    for a, b in zip(whole, ranker.scores(QUESTIONS, CANDIDATES), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_one_device_gives_what_eight_give(make, monkeypatch):
    folder, _ = make("qwen2")
    eight = build_ranker("reward_model", source=str(folder)).scores(QUESTIONS, CANDIDATES)
    monkeypatch.setattr(
        "selm_jax.feedback.models.reward_model.make_mesh",
        lambda sizes, _: make_mesh(sizes, jax.devices()[:1]),
    )
    one = build_ranker("reward_model", source=str(folder)).scores(QUESTIONS, CANDIDATES)
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_answers_have_in_common_is_computed_once(make):
    folder, _ = make("llama")
    ranker = build_ranker("reward_model", source=str(folder))
    ranker.scores(QUESTIONS[2:3], [["Yes.", "No.", "Yes."]])
    (texts,) = conversations(folder, QUESTIONS[2:3], [["Yes.", "No."]])
    report = ranker.report()
    assert report["candidates"] == 3 and report["cut"] == 0
    assert max(map(len, texts)) < report["tokens"] < len(texts[0]) + 20
    assert ranker.scores([], []) == [] and ranker.report()["tokens"] == 0


def test_bfloat16_ranks_as_float32_does(make):
    folder, _ = make("llama")
    texts = [f"{word} {n}" for word in ("A river", "soup", "No") for n in range(6)]
    full, half = (
        build_ranker("reward_model", source=str(folder), dtype=dtype).scores(
            QUESTIONS[:1], [texts]
        )[0]
        for dtype in ("float32", "bfloat16")
    )
    assert not np.array_equal(full, half)
    assert np.corrcoef(full, half)[0, 1] > 0.99


def test_too_long_texts_are_refused_or_cut_and_counted(make):
    folder, model = make("llama")
    long = ["soup " * 300, "Yes."]
    (ids,) = conversations(folder, QUESTIONS[:1], [long])
    assert len(ids[0]) > 100 > len(ids[1])
    refuse = build_ranker("reward_model", source=str(folder), max_length=100)
    with pytest.raises(
        FeedbackError,
        match=rf"prompt 'p0', candidate 0: .* has {len(ids[0])} tokens, but max_length is 100",
    ):
        refuse.scores(QUESTIONS[:1], [long])
    cut = build_ranker("reward_model", source=str(folder), max_length=100, too_long="cut")
    found = cut.scores(QUESTIONS[:1], [long])[0]
    np.testing.assert_allclose(found, theirs(model, [each[:100] for each in ids]), atol=ATOL)
    assert cut.report()["cut"] == 1


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def copy(make, tmp_path):
    """A copy of the model's folder, to be damaged."""
    return Path(shutil.copytree(make("llama")[0], tmp_path / "model"))


def test_a_language_model_is_no_reward_model(tmp_path):
    folder = tiny.make_model(tmp_path / "lm")
    with pytest.raises(
        FeedbackError, match=r"language model \(LlamaForCausalLM\).*loss: bradley_terry"
    ):
        build_ranker("reward_model", source=str(folder))


def test_more_labels_than_one_are_no_score(copy):
    file = copy / "config.json"
    hf = json.loads(file.read_text())
    file.write_text(json.dumps(hf | {"id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(UnsupportedModel, match="LlamaForSequenceClassification has 2 labels"):
        build_ranker("reward_model", source=str(copy))


def test_a_head_that_is_not_there_is_not_made_up(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"missing: score\.weight"):
        build_ranker("reward_model", source=str(copy))


def test_without_a_chat_template_it_says_whose_to_take(copy):
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(FeedbackError, match="no chat template.*trained from"):
        build_ranker("reward_model", source=str(copy))


def test_a_system_message_that_the_template_leaves_out_is_an_error(copy):
    template = (copy / "chat_template.jinja").read_text()
    only = template.replace("<|im_start|>{{", "{% if m['role'] != 'system' %}<|im_start|>{{")
    (copy / "chat_template.jinja").write_text(
        only.replace("{% endfor %}", "{% endif %}{% endfor %}")
    )
    with pytest.raises(FeedbackError, match="prompt 'p1': .*omits the system message 'Be kind.'"):
        build_ranker("reward_model", source=str(copy)).scores(QUESTIONS[1:2], [["Yes."]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"too_long": "drop"}, "too_long is 'drop'.*error, cut"),
        ({"dtype": "float16"}, "dtype is 'float16'.*did you mean"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 5000}, "the settings allow sequences of up to 5000 tokens"),
        ({"batch": True}, "batch is True"),
        ({"length": 3}, "unknown setting 'length'.*max_length"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message, make):
    with pytest.raises((FeedbackError, UnsupportedModel), match=message):
        build_ranker("reward_model", source=str(make("llama")[0]), **settings)


def test_a_score_that_is_no_number_names_its_prompt(copy):
    """The weights here are finite: others are refused when they are loaded."""
    tensors = load_file(copy / "model.safetensors")
    tensors["score.weight"] = np.full_like(tensors["score.weight"], 3e38)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FeedbackError, match="prompt 'p0', candidate 0.*(nan|inf)"):
        build_ranker("reward_model", source=str(copy)).scores(QUESTIONS[:1], [["Yes."]])
