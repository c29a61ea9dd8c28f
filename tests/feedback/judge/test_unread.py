"""Malformed answers of a judge become no number, and are not kept."""

import contextlib
import itertools
import json
import sqlite3

import numpy as np
import pytest
from scripted_judge import Judge, reply

from selm_jax.feedback.judge.answer import parse_completion
from selm_jax.feedback.judge.budget import JudgeError
from selm_jax.feedback.judge.unread import UnreadableJudge
from selm_jax.feedback.ranker import Question, build_ranker, counted

NAN = float("nan")


@pytest.fixture
def judge():
    with Judge() as judge:
        yield judge


@pytest.fixture
def ranker(judge, tmp_path):
    """Builds a judge whose prompt shows `prompt|response` or `prompt|one|other`."""

    def make(form, ranker="judge", **settings):
        template = tmp_path / f"{form}.txt"
        shown = "{response}" if form == "pointwise" else "{response_a}|{response_b}"
        template.write_text("{prompt}|" + shown)
        quick = {"base_url": judge.url, "retries": 0, "cache": str(tmp_path / "cache.sqlite")}
        about = quick | {"model": "m", "form": form, "template": str(template)} | settings
        if ranker == "judge":
            return build_ranker("judge", **about)
        part = {"ranker": "judge", "settings": about, **ranker}
        return build_ranker("mixture", parts=[{"ranker": "length"}, part])

    return make


def shown(body):
    return body["messages"][-1]["content"].split("|")[1:]


def questions(count):
    return [Question(f"Q{i}", (), {}, f"p{i}") for i in range(count)]


def kept(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.sqlite")) as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


SAYS = {
    "pointwise": ("Rating: [[7]]", "It is fine."),
    "pairwise": ("[[A]]", "Both have merits."),
    "logprob": ({"m": -0.1, "M": -2.0}, {"The": -0.1}),
}


@pytest.mark.parametrize("form", SAYS)
@pytest.mark.parametrize("policy", ["tie", "drop"])
def test_a_score_is_there_exactly_where_something_was_read(judge, ranker, form, policy):
    """Every subset of the requests about three responses is unreadable once."""
    if (form, policy) == ("pointwise", "tie"):
        return
    texts = ["a", "bb", "ccc"]
    readable, prose = SAYS[form]
    units = [(t,) for t in texts] if form == "pointwise" else list(itertools.combinations(texts, 2))
    for missing in itertools.chain.from_iterable(
        itertools.combinations(units, n) for n in (1, 2, 3)
    ):
        judge.says = lambda body, gone=missing: (
            prose if tuple(sorted(shown(body))) in gone else readable
        )
        one = ranker(form, model=f"{form} {missing}", on_malformed=policy)
        (scores,) = one.scores(questions(1), [texts])
        if form == "pointwise":
            expected = [(t,) not in missing for t in texts]
        elif policy == "drop":
            expected = [False] * 3
        else:
            expected = [any(t in unit for unit in units if unit not in missing) for t in texts]
        assert (~np.isnan(scores)).tolist() == expected
        assert one.report()["dropped"] == (not all(expected))
        times = 1 if form == "pointwise" else 2
        assert one.report()["malformed"] == times * len(missing)


@pytest.mark.parametrize("normalise", ["none", "zscore", "minmax", "rank"])
def test_a_mixture_makes_no_number_of_what_its_judge_left_out(judge, ranker, normalise):
    judge.says = lambda body: "Hm." if shown(body) == ["bb"] else "[[7]]"
    one = ranker("pointwise", {"normalise": normalise})
    first, second = one.scores(questions(2), [["a", "bb", "ccc"], ["a", "ccc"]])
    gaps = [False, True, False] if normalise == "none" else [True] * 3
    assert np.isnan(first).tolist() == gaps and np.isfinite(second).all()
    assert counted(one.report(), "malformed") == 1 and counted(one.report(), "asked") == 5


def test_a_judge_that_is_never_understood_is_stopped_early(judge, ranker, tmp_path):
    judge.says = lambda body: "I like it."
    one = ranker("pointwise", concurrency=1)
    with pytest.raises(UnreadableJudge, match="20 of the first 20 .*'p0': 'I like it.*template"):
        one.scores(questions(100), [["a"]] * 100)
    assert len(judge.bodies) <= 22 and kept(tmp_path) == 0
    judge.says = lambda body: "[[3]]"  # it is mended, and keeps its name
    mended = ranker("pointwise").scores(questions(100), [["a"]] * 100)
    assert np.concatenate(mended).tolist() == [3.0] * 100


def test_the_watch_goes_on_over_several_askings(judge, ranker):
    judge.says = lambda body: "I like it."
    one = ranker("pointwise", concurrency=1)
    with pytest.raises(UnreadableJudge, match="20 of the first 20"):
        for i in range(20):
            one.scores(questions(20)[i : i + 2], [["a"], ["b"]])


def test_one_that_is_understood_more_often_than_not_is_not_stopped(judge, ranker):
    judge.says = lambda body: (
        "Hm." if int(body["messages"][-1]["content"][1:-2]) % 5 < 2 else "[[4]]"
    )
    one = ranker("pointwise", concurrency=1)
    scores = np.concatenate(one.scores(questions(100), [["a"]] * 100))
    assert np.isnan(scores).sum() == one.report()["malformed"] == 40


@pytest.mark.parametrize("form", SAYS)
def test_what_cannot_be_read_is_not_kept_but_asked_once_by_one_process(
    judge, ranker, tmp_path, form
):
    readable, prose = SAYS[form]
    judge.says = lambda body: prose if "Q1|" in body["messages"][-1]["content"] else readable
    one = ranker(form)
    each = [["a", "b"]] * 3
    before = one.scores(questions(3), each)
    np.testing.assert_equal(one.scores(questions(3), each), before)
    assert len(judge.bodies) == 6 and kept(tmp_path) == 4
    judge.says = lambda body: readable
    again = ranker(form)
    after = again.scores(questions(3), each)
    assert np.isfinite(after).all() and again.report()["requests"] == 2 and kept(tmp_path) == 6


def test_an_unreadable_answer_that_an_older_version_kept_is_asked_for_again(
    judge, ranker, tmp_path
):
    judge.says = lambda body: "[[4]]"
    ranker("pointwise").scores(questions(1), [["a"]])
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.sqlite")) as connection:
        connection.execute("UPDATE answers SET answer = replace(answer, '[[4]]', 'Hm.')")
        connection.commit()
    (scores,) = ranker("pointwise").scores(questions(1), [["a"]])
    assert scores.tolist() == [4.0] and len(judge.bodies) == 2 and kept(tmp_path) == 1


def test_an_answer_without_log_probabilities_stops_nothing(judge, ranker, tmp_path):
    """As llama.cpp answers where the one token is part of a character: 1 of 36."""
    judge.says = lambda body: "\ufffd" if shown(body) == ["a", "b"] else {"m": -0.2, "M": -1.8}
    for requests in (6, 1):  # the second run asks for what the first could not read
        one = ranker("logprob")
        first, second = one.scores(questions(2), [["a", "b"], ["c", "d", "c"]])
        assert np.isnan(first).all() and np.isfinite(second).all()
        assert one.report()["malformed"] == 1 and kept(tmp_path) == 3
        requests = {6: 4, 1: 1}[requests]
        assert one.report()["requests"] == requests


def test_a_server_without_log_probabilities_is_told_so(judge, ranker):
    judge.says = lambda body: "m"
    with pytest.raises(UnreadableJudge, match="without log-probabilities.*form: pairwise"):
        ranker("logprob").scores(questions(50), [["a", "b"]] * 50)


def vllm(body, draw):
    """vLLM's log-probabilities: the sampled token first, then the likeliest, cut to length."""
    logps = {"The": -0.7, "I": -1.0, "Both": -2.0, "M": -4.0, "m": -5.0, "Yes": -6.0, "Any": -7.0}
    likeliest = sorted(logps, key=logps.get, reverse=True)
    drawn = draw if body["temperature"] > 0 else likeliest[0]
    told = [drawn, *(t for t in likeliest if t != drawn)][: body["top_logprobs"]]
    tree = reply({t: logps[t] for t in told})
    tree["choices"][0]["message"]["content"] = drawn
    return tree


def test_the_drawn_token_pushes_nothing_out(judge, ranker):
    """Told to draw, vLLM leaves `m` out whenever an unlikely token is drawn."""
    judge.says = lambda body: vllm(body, "Yes")
    (scores,) = ranker("logprob").scores(questions(1), [["a", "b"]])
    assert scores.tolist() == [0.5, 0.5]
    hot = ranker("logprob", temperature=1.0)
    hot.scores(questions(1), [["a", "b"]])
    assert judge.bodies[-1]["temperature"] == 1.0
    answers = [parse_completion(json.dumps(vllm(b, "Yes"))) for b in judge.bodies[1:3]]
    assert ["m" in a.logprobs[0] for a in answers] == [True, False]


# The wire


def body_of(content, usage):
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return {"choices": choices, "usage": usage}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[[7]]", "[[7]]"),
        ([{"type": "text", "text": "[[7]]"}], "[[7]]"),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "perhaps [[2]]"}]},
                {"type": "text", "text": "It is "},
                {"type": "text", "text": "[[7]]"},
            ],
            "It is [[7]]",
        ),
        ([{"type": "output_text", "text": "[[7]]", "annotations": []}], "[[7]]"),
        ([], ""),
        (None, ""),
    ],
)
def test_a_content_in_parts(content, text):
    assert parse_completion(json.dumps(body_of(content, None))).text == text


@pytest.mark.parametrize("content", [["[[7]]"], [{"text": "[[7]]"}], {"text": "x"}, 7])
def test_a_content_that_is_none(content):
    with pytest.raises(ValueError, match="."):
        parse_completion(json.dumps(body_of(content, None)))


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"prompt_tokens": None, "completion_tokens": None},
        {"prompt_tokens": "many", "completion_tokens": 1},
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": 1e999, "completion_tokens": 1},
        {},
        [],
        "7",
    ],
)
def test_an_answer_whose_tokens_nobody_counted_is_paid_for_once(judge, ranker, tmp_path, usage):
    judge.says = lambda body: body_of([{"type": "text", "text": "[[7]]"}], usage)
    one = ranker("pointwise", retries=3)
    assert one.scores(questions(1), [["a"]])[0].tolist() == [7.0]
    report = one.report()
    assert (report["requests"], report["without_usage"], kept(tmp_path)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("error", "field", "way_out"),
    [
        (
            (
                "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead."
            ),
            "max_tokens",
            {"max_tokens": None, "max_completion_tokens": 1024},
        ),
        (
            "Unsupported value: 'temperature' does not support 0.0 with this model.",
            "temperature",
            {"temperature": None},
        ),
    ],
)
def test_a_field_that_is_refused_has_a_way_out(judge, ranker, error, field, way_out):
    judge.refuses = lambda body: error if field in body else None
    judge.says = lambda body: "[[7]]"
    shown_way = json.dumps(way_out).replace('"', "")
    with pytest.raises(JudgeError) as caught:
        ranker("pointwise").scores(questions(1), [["a"]])
    assert f"extra: {shown_way}" in str(caught.value)
    one = ranker("pointwise", extra=way_out)
    assert one.scores(questions(1), [["a"]])[0].tolist() == [7.0]
    assert field not in judge.bodies[-1]


def test_another_refusal_has_none(judge, ranker):
    judge.refuses = lambda body: "This model's maximum context length is 512 tokens."
    with pytest.raises(JudgeError, match="400") as caught:
        ranker("pointwise").scores(questions(1), [["a"]])
    assert "extra" not in str(caught.value)
