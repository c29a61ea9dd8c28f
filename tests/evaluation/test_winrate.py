"""Win rates: the fit against another optimiser, the matrix against counting, faults injected."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from rich.console import Console
from tiny import PROMPTS
from typer.testing import CliRunner

from selm_jax.cli import app
from selm_jax.evaluation import EvaluationError, winrate
from selm_jax.evaluation.answers import Asked, Stored, read, write
from selm_jax.evaluation.contestants import contestants
from selm_jax.evaluation.model import open_found
from selm_jax.feedback import ranker as rankers
from selm_jax.text.conversations import Message, Prompt

QUIET = Console(quiet=True)


def answers(texts, samples=1) -> list[Stored]:
    return [
        Stored(f"p{i}", (Message("user", PROMPTS[i]),), s, text * (s + 1))
        for i, text in enumerate(texts)
        for s in range(samples)
    ]


@pytest.fixture
def files(tmp_path):
    """Three files of answers to 30 prompts: long ones, short ones, and some of each."""
    rng = np.random.default_rng(0)
    size = {"long": (5, 9), "short": (1, 5), "mixed": (1, 9)}
    for name, (low, high) in size.items():
        texts = ["good " * int(n) for n in rng.integers(low, high, 30)]
        write(tmp_path / f"{name}.jsonl", answers(texts), name)
    return [str(tmp_path / f"{name}.jsonl") for name in size]


def compared(names, ranker, tmp_path, **more):
    found = contestants(names, iteration=None, revision=None, files=True)
    more = {"asked": Asked(1, 0, 6), "open_model": None, "prompts": None, "console": QUIET} | more
    return winrate.run(found, ranker=ranker, out=tmp_path / "out", keep=tmp_path / "kept", **more)


def test_the_matrix_is_a_count(files, tmp_path):
    report = compared(files, rankers.build_ranker("length", target=20), tmp_path)
    sets = [read(tmp_path / f"{n}.jsonl") for n in ("long", "short", "mixed")]
    score = rankers.build_ranker("length", target=20)
    for i, j in itertools.product(range(3), repeat=2):
        wins = []
        for a, b in zip(sets[i], sets[j], strict=True):
            x, y = score.scores([a.question], [[a.text, b.text]])[0]
            wins.append(0.5 if x == y else float(x > y))
        assert report["matrix"][i][j] == pytest.approx(np.mean(wins))
        both = report["length_controlled_matrix"]
        assert both[i][j] + both[j][i] == pytest.approx(1)
    assert any(p["ties"] > 0 for p in report["pairs"])
    lines = (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 30
    with pytest.raises(EvaluationError, match="already exists"):
        compared(files, score, tmp_path)


def test_wins_by_length_alone_are_none_at_equal_length():
    """A ranker that prefers length alone: the raw rate shows a winner, the controlled one none."""
    rng = np.random.default_rng(2)
    one = answers(["x" * int(n) for n in rng.integers(40, 90, 48)])
    other = answers(["x" * int(n) for n in rng.integers(20, 80, 48)])
    y = np.array([float(len(a.text) > len(b.text)) for a, b in zip(one, other, strict=True)])
    found = winrate.compare(y, one, other)
    raw, even = found["win_rate"]["mean"], found["length_controlled"]["mean"]
    assert raw > 0.7 and abs(even - 0.5) < 0.5 * (raw - 0.5)
    assert found["length_weight"] > 0.5


@pytest.mark.parametrize("y", [0.0, 0.5, 1.0])
def test_one_sided_shares_are_finite_and_no_points(y):
    same = answers(["word"] * 12)
    found = winrate.compare(np.full(12, y), same, same)
    assert found["win_rate"]["mean"] == y
    assert 0 <= found["length_controlled"]["mean"] <= 1
    assert abs(found["length_controlled"]["mean"] - y) < 0.05
    for rate in (found["win_rate"], found["length_controlled"]):
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
        assert rate["high"] - rate["low"] > 0.2


def test_one_prompt_is_reported_in_json_that_every_reader_takes(tmp_path):
    for name, text in (("one", "good"), ("two", "good and long")):
        write(tmp_path / f"{name}.jsonl", answers([text]), name)
    seen = Console(record=True, width=200)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    compared(files, rankers.build_ranker("length", target=1), tmp_path, console=seen)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "out" / "winrate.json").read_text()
    (pair,) = json.loads(text, parse_constant=refuse)["pairs"]
    assert pair["prompts"] == 1 and pair["win_rate"]["stderr"] is None
    assert pair["win_rate"]["low"] < 0.3 and "one over two: 1.000 [0.2" in seen.export_text()


def test_samples_of_a_prompt_are_one_cluster():
    """A prompt's samples that say the same four times give the interval of one."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 40).astype(float)
    once, often = answers(["ab"] * 40), answers(["ab"] * 40, 4)
    a = winrate.compare(y, once, once)["win_rate"]
    b = winrate.compare(np.repeat(y, 4), often, often)["win_rate"]
    assert a == pytest.approx(b)


class Moody:
    name = "moody"

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def scores(self, questions, candidates):
        return [self.rng.normal(size=len(texts)) for texts in candidates]


def test_a_ranker_that_is_not_antisymmetric_stops(files, tmp_path):
    with pytest.raises(EvaluationError, match="not antisymmetric: at prompt"):
        compared(files, Moody(), tmp_path)
    assert not (tmp_path / "out").exists()


def spoiled(lines, how):
    rows = [json.loads(line) for line in lines]
    if how == "missing":
        del rows[3]
    elif how == "twice":
        rows.append(rows[3])
    elif how == "changed":
        rows[3]["messages"][0]["content"] = "Another question?"
    elif how == "no text":
        del rows[3]["text"]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"lacks 1 of 30 answers .* 'p3'"),
        ("twice", "line 31: prompt 'p3' already has an answer with `sample` 0"),
        ("changed", "'p3' differs between"),
        ("no text", "line 4: not an answer: KeyError: 'text'"),
    ],
)
def test_bad_files_of_answers_are_named(files, tmp_path, how, says):
    file = tmp_path / "short.jsonl"
    file.write_text(spoiled(file.read_text().splitlines(), how))
    with pytest.raises(EvaluationError, match=says):
        compared(files, rankers.build_ranker("length", target=20), tmp_path)
    assert not (tmp_path / "out").exists()


def test_answers_come_back_whatever_ends_a_line_elsewhere(tmp_path):
    asked = (Message("user", "One\u2028two"),)
    wrote = [Stored("p\x85", asked, 0, "a\u2029b\x0cc\rd", row={"note": "x\u2028y"})]
    write(tmp_path / "one.jsonl", wrote, "model")
    assert read(tmp_path / "one.jsonl") == wrote


@pytest.fixture
def scripted(judge, tmp_path):
    """The settings of a judge whose verdict is `verdict(first, second)`, or of the one response."""

    def settings(verdict, form="pairwise"):
        judge.says = lambda body: verdict(*body["messages"][-1]["content"].split("<<>>")[1:-1])
        template = tmp_path / "template.txt"
        responses = "{response}" if form == "pointwise" else "{response_a}<<>>{response_b}"
        template.write_text("{prompt}<<>>" + responses + "<<>>")
        return {
            "model": "scripted", "form": form, "base_url": judge.url, "template": str(template),
            "cache": str(tmp_path / "cache.sqlite"), "retries": 0,
        }  # fmt: skip

    return settings


@pytest.mark.parametrize(
    ("verdict", "rate"),
    [
        (lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]", 1.0),
        (lambda a, b: "[[A]]", 0.5),  # likes what comes first: its two orders disagree
    ],
)
def test_a_judge_is_asked_in_both_orders_and_not_twice(
    judge, scripted, files, tmp_path, verdict, rate
):
    one, seen = rankers.build_ranker("judge", **scripted(verdict)), Console(record=True, width=160)
    compared(files[:2], one, tmp_path, dry_run=True, console=seen)
    assert not judge.bodies and not (tmp_path / "out").exists()
    assert " 60 " in seen.export_text()  # two orders of thirty prompts, at most
    report = compared(files[:2], one, tmp_path, console=seen)
    assert report["matrix"][0][1] == rate
    assert 0 < len(judge.bodies) <= 60
    # The second asking, the other way round, was answered from the cache.
    assert report["pairs"][0]["ranker"]["requests"] == 0
    assert report["judge_answers"] == len(judge.bodies) and report["malformed"] == 0
    assert "could not be read" not in seen.export_text()


@pytest.mark.parametrize("form", ["pairwise", "pointwise"])
def test_a_judge_in_prose_is_an_error_unless_allowed(judge, scripted, files, tmp_path, form):
    def says(*answers):
        if any(len(a) == len("good ") for a in answers):
            return "Well, that has its merits."
        return "[[7]]" if form == "pointwise" else "[[A]]"

    lengths = [[len(a.text) for a in read(tmp_path / f"{n}.jsonl")] for n in ("long", "short")]
    prompts = lengths[1].count(len("good "))
    malformed = prompts * (1 if form == "pointwise" else 2)  # a pair is asked in both orders
    assert malformed
    one, before = rankers.build_ranker("judge", **scripted(says, form)), sorted(tmp_path.iterdir())
    says_so = rf"{malformed} of 60 answers so far .*'Well, that has its merits.*cache\.sqlite"
    with pytest.raises(EvaluationError, match=f"{says_so}.*--allow-malformed {malformed}, .* ties"):
        compared(files[:2], one, tmp_path, allow_malformed=malformed - 1)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "cache.sqlite"])
    asked, seen = len(judge.bodies), Console(record=True, width=160)
    report = compared(files[:2], one, tmp_path, allow_malformed=malformed, console=seen)
    assert len(judge.bodies) == asked == 60
    assert f"{malformed} of 60 answers of the judge could not be read; they count as ties" in (
        seen.export_text()
    )
    stored = json.loads((tmp_path / "out" / "winrate.json").read_text())
    assert (stored["malformed"], stored["judge_answers"]) == (malformed, 60)
    assert stored["allow_malformed"] == malformed and stored["matrix"] == report["matrix"]
    rows = [
        json.loads(x) for x in (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines()
    ]
    assert [r["share_of_a"] for r in rows].count(0.5) >= prompts


def test_malformed_answers_of_all_pairs_and_of_a_mixtures_judge_count(scripted, files, tmp_path):
    """A judge that does not understand the third contestant's answers: 60 in each of two pairs."""
    write(tmp_path / "mixed.jsonl", answers([f"{i} mixed" for i in range(30)]), "mixed")
    settings = scripted(lambda a, b: "Hm." if "mixed" in a + b else "[[tie]]")
    parts = [
        {"ranker": "length", "settings": {"target": 3}}, {"ranker": "judge", "settings": settings}
    ]  # fmt: skip
    one = rankers.build_ranker("mixture", parts=parts)
    with pytest.raises(EvaluationError, match="ranker mixture: 60 of 120 answers so far .*'Hm.'"):
        compared(files, one, tmp_path, allow_malformed=59)
    with pytest.raises(EvaluationError, match="ranker mixture: 120 of 180 answers so far"):
        compared(files, one, tmp_path, allow_malformed=119)
    assert compared(files, one, tmp_path, allow_malformed=120)["malformed"] == 120


def test_the_verb_takes_what_is_allowed(scripted, files, tmp_path):
    given = ["eval", "winrate", *files[:2], "--ranker", "judge", "-o", str(tmp_path / "out")]
    settings = scripted(lambda a, b: "Hm.")
    given += [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    assert "allow a number of them with --allow-malformed" in str(
        CliRunner().invoke(app, given).exception
    )
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*given, "--allow-malformed", "60"])
    assert result.exit_code == 0 and "60 of 60 answers of the judge" in result.output


def test_a_models_answers_are_drawn_once(folders, files, tmp_path, monkeypatch):
    prompts = [Prompt(f"p{i}", (Message("user", PROMPTS[i]),)) for i in range(30)]
    names = [f"one={folders[0]}", files[0]]
    how = {
        "prompts": lambda: prompts,
        "open_model": lambda found: open_found(found, slots=8, console=QUIET),
    }
    first = compared(names, rankers.build_ranker("length", target=20), tmp_path, **how)
    monkeypatch.setattr("selm_jax.policy.policy.Policy.answer", None)  # to call it would fail
    (tmp_path / "out").rename(tmp_path / "before")
    assert compared(names, rankers.build_ranker("length", target=20), tmp_path, **how) == first


def test_who_is_compared_must_be_told_apart(files):
    with pytest.raises(EvaluationError, match="the name long is given twice"):
        contestants([files[0], files[0]], iteration=None, revision=None, files=True)
    with pytest.raises(EvaluationError, match="gone.jsonl: this file of answers does not exist"):
        contestants(["x=gone.jsonl"], iteration=None, revision=None, files=True)
