"""MT-Bench: FastChat's files in and out, with a scripted judge; no verdict is guessed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import re
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from selm_jax.cli import app
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.files import Journal
from selm_jax.evaluation.benchmarks.mt_bench import answer as bench
from selm_jax.evaluation.benchmarks.mt_bench import judge as judging
from selm_jax.evaluation.benchmarks.mt_bench import judgments as verdicts
from selm_jax.evaluation.benchmarks.mt_bench import score
from selm_jax.evaluation.model import Model
from selm_jax.feedback.judge.answer import Completion
from selm_jax.feedback.judge.budget import JudgeError
from selm_jax.feedback.judge.client import Client
from selm_jax.shell.artifacts import ArtifactError

CATEGORIES = ("writing", "math", "stem", "poetry", "math")
QUESTIONS = [
    {"question_id": 81 + i, "category": c, "turns": [f"Ask {i} {{x}}", f"And {i}?"]}
    for i, c in enumerate(CATEGORIES)
]
REFERENCES = [(82, ("four", "five")), (85, ("six", "seven"))]


def template(name: str) -> str:
    """All that such a prompt may name, in the published forms' way."""
    pair, math, multi = "pair" in name, "math" in name, "multi" in name
    answers = ("answer_a", "answer_b") if pair else ("answer",)
    turns = ("_1", "_2") if multi else ("",)
    fields = [field + turn for turn in turns for field in ("question", *answers)]
    fields += ([f"ref_answer{turn}" for turn in ("_1", "_2")[: len(turns)]]) if math else []
    return f"{name}\n" + "\n".join(f"[{each}] {{{each}}}" for each in fields)


PROMPTS = [
    {"name": n, "system_prompt": f"System of {n}\n\n", "prompt_template": template(n)}
    for n in judging.PROMPTS.values()
]


def lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def answer_rows(name, said, ids=range(81, 86)):
    return [
        {
            "question_id": i, "answer_id": "x", "model_id": name, "tstamp": 0.0,
            "choices": [{"index": 0, "turns": [f"{said} {i} first", f"{said} {i} second"]}],
        }
        for i in ids
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    references = [
        {"question_id": i, "model_id": "gpt-4", "choices": [{"index": 0, "turns": list(turns)}]}
        for i, turns in REFERENCES
    ]
    return SimpleNamespace(
        questions=lines(tmp_path / "question.jsonl", QUESTIONS),
        prompts=lines(tmp_path / "judge_prompts.jsonl", PROMPTS),
        references=lines(tmp_path / "reference.jsonl", references),
        one=lines(tmp_path / "one.jsonl", answer_rows("one", "I {say}")),
        two=lines(tmp_path / "two.jsonl", answer_rows("two", "You say")),
        folder=tmp_path / "out",
    )


@pytest.fixture
def todo(files):
    """The judgments of `one`, or of `one` against `two`, and the questions."""

    def make(mode):
        questions = bench.read_questions(files.questions, unpublished=True)
        need = [q for q in questions if q.category in judging.WITH_REFERENCE]
        references = bench.read_answers(files.references, need)[1]
        answers = [bench.read_answers(files.one, questions)]
        if mode == "pair":
            answers.append(bench.read_answers(files.two, questions))
        prompts = judging.read_prompts(files.prompts, unpublished=True)
        return judging.matches(mode, questions, answers, references, prompts), questions

    return make


@pytest.fixture
def run(judge, files, todo):
    """Judges with the scripted judge; the rows and the client."""

    def go(mode="single", repeats=1, sampling=None, **settings):
        settings = {"backoff": 0.01, "cache": files.folder / "judge.sqlite"} | settings
        files.folder.mkdir(exist_ok=True)
        client = Client("the/judge", base_url=judge.url, **settings)
        journal = verdicts.journal(files.folder, mode, client.model)
        matches, _ = todo(mode)
        return asyncio.run(
            judging.ask(mode, matches, repeats, client, journal, sampling or judging.Sampling())
        )

    return go


def said(text, finish="stop"):
    return Completion(text, None, None, finish)


class TestQuestions:
    def test_the_published_files(self, shared):
        folder = shared / "mt_bench"
        questions = bench.read_questions(folder / "question.jsonl")
        assert Counter(q.category for q in questions) == dict.fromkeys(bench.TEMPERATURES, 10)
        need = [q for q in questions if q.category in judging.WITH_REFERENCE]
        references = bench.read_references(folder / "reference_gpt-4.jsonl", need)
        assert len(references) == 30
        prompts = judging.read_prompts(folder / "judge_prompts.jsonl")
        assert sorted(prompts) == sorted(judging.PROMPTS.values())

    def test_other_reference_answers_are_not_mt_benchs(self, shared, tmp_path):
        folder = shared / "mt_bench"
        questions = bench.read_questions(folder / "question.jsonl")
        need = [q for q in questions if q.category in judging.WITH_REFERENCE]
        text = (folder / "reference_gpt-4.jsonl").read_text()
        other = tmp_path / "reference.jsonl"
        other.write_text(text.replace("second place", "first place", 1))
        with pytest.raises(EvaluationError, match="not MT-Bench's reference answers"):
            bench.read_references(other, need)
        assert bench.read_references(other, need, unpublished=True)
        other.write_text("\n".join(reversed(text.strip().split("\n"))))  # order says nothing
        assert len(bench.read_references(other, need)) == 30

    def test_made_up_reference_answers_are_refused_too(self, files):
        questions = bench.read_questions(files.questions, unpublished=True)
        need = [q for q in questions if q.category in judging.WITH_REFERENCE]
        with pytest.raises(EvaluationError, match="not MT-Bench's reference.*--unpublished"):
            bench.read_references(files.references, need)

    def test_temperatures_by_category(self, files):
        questions = bench.read_questions(files.questions, unpublished=True)
        assert [q.temperature for q in questions] == [0.7, 0.0, 0.1, 0.7, 0.0]

    def test_other_questions_are_not_mt_bench(self, files, shared, tmp_path):
        with pytest.raises(EvaluationError, match="its 5 questions are not the 80.*--unpublished"):
            bench.read_questions(files.questions)
        rows = (shared / "mt_bench/question.jsonl").read_text().replace("Hawaii", "Maui")
        file = tmp_path / "changed.jsonl"
        file.write_text(rows)
        with pytest.raises(EvaluationError, match="not the 80"):
            bench.read_questions(file)
        with pytest.raises(EvaluationError, match="not MT-Bench's prompts"):
            judging.read_prompts(files.prompts)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"question_id": 81}, "row 1: question 81 appears twice"),
            ({"question_id": "82"}, "row 1: expected question_id"),
            ({"turns": ["one"]}, "row 1: expected .*2 `turns`"),
            ({"turns": ["one", 2]}, "row 1: expected .*2 `turns`"),
            ({"turns": "ab"}, "row 1: expected .*2 `turns`"),
            ({"category": None}, "row 1: expected .*category"),
        ],
    )
    def test_bad_questions(self, tmp_path, change, says):
        rows = [row | (change if i == 1 else {}) for i, row in enumerate(QUESTIONS)]
        with pytest.raises(EvaluationError, match=says):
            bench.read_questions(lines(tmp_path / "q.jsonl", rows), unpublished=True)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda rows: rows[:-1], "the prompt 'single-v1-multi-turn' is missing"),
            (lambda rows: [rows[0] | {"prompt_template": "{answer}"}, *rows[1:]], "'pair-math-v1'"),
            (
                lambda rows: [rows[0] | {"system_prompt": None}, *rows[1:]],
                "'system_prompt' is None",
            ),
        ],
    )
    def test_bad_prompts(self, tmp_path, change, says):
        rows = sorted(PROMPTS, key=lambda row: row["name"])
        with pytest.raises(EvaluationError, match=says):
            judging.read_prompts(lines(tmp_path / "p.jsonl", change(rows)), unpublished=True)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda rows: rows[:-1], "answers to 1 questions are missing, such as 85"),
            (lambda rows: [*rows, rows[0]], "row 5: question 81 is answered twice"),
            (lambda rows: [rows[0] | {"model_id": "z"}, *rows[1:]], "several models: one, z"),
            (
                lambda rows: [rows[0] | {"choices": []}, *rows[1:]],
                "row 0: not an answer in FastChat",
            ),
            (
                lambda rows: [rows[0] | {"choices": [{"turns": ["a"]}]}, *rows[1:]],
                "row 0: `turns` must be 2 strings",
            ),
        ],
    )
    def test_bad_answers(self, files, tmp_path, change, says):
        questions = bench.read_questions(files.questions, unpublished=True)
        file = lines(tmp_path / "a.jsonl", change(answer_rows("one", "I")))
        with pytest.raises(EvaluationError, match=says):
            bench.read_answers(file, questions)


DECODING = bench.Decoding(max_new_tokens=5)


class TestAnswers:
    @pytest.fixture
    def calls(self, monkeypatch):
        """Records what the model is asked."""
        found = []
        answer = Model.reply

        def spy(self, conversations, **settings):
            asked = [[(m.role, m.content) for m in c] for c in conversations]
            found.append((settings["temperature"], asked))
            return answer(self, conversations, **settings)

        monkeypatch.setattr(Model, "reply", spy)
        return found

    @pytest.mark.slow
    def test_fastchats_format_and_two_turns(self, model, files, calls):
        questions = bench.read_questions(files.questions, unpublished=True)
        file = bench.answer(model, questions, files.folder, DECODING, "org/mine")
        assert file == files.folder / "model_answer" / "org--mine.jsonl"
        rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
        assert [row["question_id"] for row in rows] == [81, 82, 83, 84, 85]
        for row in rows:
            assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
            assert row["model_id"] == "org/mine" and row["choices"][0]["index"] == 0
        said = {row["question_id"]: row["choices"][0]["turns"] for row in rows}
        assert bench.read_answers(file, questions) == (
            "org/mine", {i: tuple(turns) for i, turns in said.items()}
        )  # fmt: skip
        seen = {}
        for temperature, conversations in calls:
            for conversation in conversations:
                seen[conversation[0][1], len(conversation)] = temperature, conversation
        for q in questions:
            first, (question, answered, again) = seen[q.turns[0], 1], seen[q.turns[0], 3][1]
            assert first == (q.temperature, [("user", q.turns[0])])
            assert (question, again) == (("user", q.turns[0]), ("user", q.turns[1]))
            assert answered == ("assistant", said[q.id][0])
        assert len(seen) == 10

    def test_it_goes_on_question_by_question(self, model, files, tmp_path, calls, monkeypatch):
        questions = bench.read_questions(files.questions, unpublished=True)
        said = lambda file: [json.loads(x)["choices"] for x in file.read_text().split("\n")[:-1]]
        whole = said(bench.answer(model, questions, tmp_path / "whole", DECODING))
        both = bench._both_turns

        def stops(model, asked, *rest):
            if asked[0].category == "stem":
                raise KeyboardInterrupt
            return both(model, asked, *rest)

        monkeypatch.setattr(bench, "_both_turns", stops)
        with pytest.raises(KeyboardInterrupt):
            bench.answer(model, questions, files.folder, DECODING)
        file = bench.answer_file(files.folder, model.name)
        assert len(said(file)) == 2  # both questions of temperature 0
        with file.open("ab") as f:
            f.write(b'{"question_id": 83, "choic')
        with pytest.raises(ArtifactError, match="seed was 0 and is now 1"):
            bench.answer(model, questions, files.folder, bench.Decoding(5, seed=1))
        monkeypatch.setattr(bench, "_both_turns", both)
        calls.clear()
        cost = bench.cost_of_answers(model, questions, files.folder, DECODING, model.name)
        assert (cost.answers, cost.new_tokens) == (6, 30)
        assert said(bench.answer(model, questions, files.folder, DECODING)) == whole
        assert sum(len(conversations) for _, conversations in calls) == 6

    def test_what_is_answered_together_is_on_the_disk_before_the_next(
        self, model, files, monkeypatch
    ):
        """With one slot that is one question."""
        seen = []

        def both(model, asked, *rest):
            file = bench.answer_file(files.folder, model.name)
            there = len(file.read_text().splitlines()) if file.exists() else 0
            seen.append((len(asked), there))
            choice = {"turns": ["a", "b"], "finish": ["stop"] * 2, "tokens": [1, 1]}
            return [{"question_id": q.id, "choices": [choice]} for q in asked]

        monkeypatch.setattr(model, "batches", dataclasses.replace(model.batches, slots=1))
        monkeypatch.setattr(bench, "_both_turns", both)
        questions = bench.read_questions(files.questions, unpublished=True)
        bench.answer(model, questions, files.folder, DECODING)
        assert seen == [(1, i) for i in range(5)]

    def test_a_conversation_that_is_too_long_names_its_questions(self, model, files):
        questions = bench.read_questions(files.questions, unpublished=True)
        with pytest.raises(EvaluationError, match="turn 1 of the questions 82, 85: .*512"):
            bench.answer(model, questions, files.folder, bench.Decoding(max_new_tokens=500))


class TestRequests:
    def test_texts_are_the_templates_filled(self, judge, run, todo):
        rows = run()
        matches, questions = todo("single")
        assert len(rows) == len(judge.bodies) == 10
        by_text = {b["messages"][1]["content"]: b for b in judge.bodies}
        for match, row in zip(matches, rows, strict=True):
            question = next(q for q in questions if q.id == match.question)
            math = question.category == "math"
            name = f"single-{'math-' if math else ''}v1{'-multi-turn' if match.turn == 2 else ''}"
            i = match.question
            fields = {
                "question": question.turns[0], "answer": f"I {{say}} {i} first",
                "question_1": question.turns[0], "question_2": question.turns[1],
                "answer_1": f"I {{say}} {i} first", "answer_2": f"I {{say}} {i} second",
            }  # fmt: skip
            if math:
                fields |= zip(("ref_answer_1", "ref_answer_2"), dict(REFERENCES)[i], strict=True)
            expected = template(name).format(**fields)
            assert row["user_prompt"] == expected and row["judge"] == ["the/judge", name]
            assert by_text[expected] == {
                "model": "the/judge", "temperature": 0.0, "max_tokens": 2048,
                "messages": [
                    {"role": "system", "content": f"System of {name}\n\n"},
                    {"role": "user", "content": expected},
                ],
            }  # fmt: skip
            assert ("four" in expected) == (match.question == 82)

    def test_pairs_in_both_orders(self, judge, run):
        judge.says = lambda body: (
            "[[A]]" if "I {say} 81" in body["messages"][1]["content"] else "[[C]]"
        )
        rows = run("pair")
        assert len(judge.bodies) == 20
        for row in rows:
            one, two = row["g1_user_prompt"], row["g2_user_prompt"]
            assert one != two and one.index("I {say}") < one.index("You say")
            assert two.index("I {say}") > two.index("You say")
            # A is always shown first: model 1 in the first game, model 2 in the second.
            winners = ("model_1", "model_2") if row["question_id"] == 81 else ("tie", "tie")
            assert (row["g1_winner"], row["g2_winner"]) == winners
            assert score.outcome(row) == 0.5
        assert list(rows[0])[:12] == [
            "question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge",
            "g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment", "turn", "tstamp",
        ]  # fmt: skip


class TestVerdicts:
    @pytest.mark.parametrize(
        ("text", "rating"),
        [
            ("Good.\nRating: [[7]]", 7),
            ("Rating: [[7.5]]", 7.5),
            ("rating: [8]", 8),
            ("**Rating**: [6.5]", 6.5),
            ("As [1] says, it is fine.", -1),  # a citation
            ("Rating: [[7]], at first [[3]]", -1),
            ("Rating: [[7]]. So: [[7.0]]", 7),
            ("Rating: [[0]]", -1),
            ("Rating: [[11]]", -1),
            ("Rating: [12]", -1),
            ("Rating: [[bad]] rating [5]", -1),
            ("seven of ten", -1),
            ("", -1),
            ("<think>[[3]]</think> Rating: [[9]]", 9),
        ],
    )
    def test_ratings(self, text, rating):
        found = judging.score_of(said(text))
        assert found == rating and isinstance(found, type(rating))

    @pytest.mark.parametrize(
        ("text", "winner"),
        [
            ("[[A]]", "x"), ("So [[B]].", "y"), ("[[C]]", "tie"), ("[[A]] or [[B]]", "error"),
            ("A", "error"), ("", "error"), ("[A]", "error"),
        ],
    )  # fmt: skip
    def test_winners(self, text, winner):
        assert judging.winner_of(said(text), "x", "y") == winner

    def test_malformed_ones_are_written_counted_and_left_out(self, judge, run, todo):
        def says(body):
            text = body["messages"][1]["content"]
            if "Ask 0" in text:
                return "I liked it."
            return f"[[{4 if 'multi' in text else 8}]]"

        judge.says = says
        rows = run()
        assert [row["score"] for row in rows] == [-1, 8, 8, 8, 8, -1, 4, 4, 4, 4]
        found = score.single(rows, todo("single")[1])
        assert found["overall"] | {"low": 0, "high": 0} == {
            "judgments": 10, "malformed": 2, "score": 6.0, "low": 0, "high": 0
        }  # fmt: skip
        assert found["categories"]["writing"]["score"] is None
        assert "writing      no readable" in score.table("x", found)

    @pytest.mark.parametrize("mode", ["single", "pair"])
    def test_a_judge_in_prose_is_given_up_and_asked_again_when_repaired(
        self, judge, run, files, mode
    ):
        """Also what was under way when it was given up: the cache holds none of its prose."""
        judge.says = lambda body: "It is a good answer, all in all."
        with pytest.raises(EvaluationError, match="first 20 verdicts .*good answer, all in all"):
            run(mode, repeats=9, concurrency=7)
        asked = len(judge.bodies)
        assert asked < (20 if mode == "single" else 40) + 2 * 7
        assert not (files.folder / "model_judgment").exists()
        judge.says = lambda body: "[[6]]" if mode == "single" else "[[B]]"
        judge.bodies.clear()
        rows = run(mode, repeats=3)
        assert len(judge.bodies) == (30 if mode == "single" else 60)
        assert not any(map(verdicts.is_malformed, rows))

    def test_what_a_judge_that_is_given_up_said_before_is_not_forgotten(self, judge, run):
        """Answers that could be read are paid for once, also those of a part of a pair."""
        judge.says = lambda body: "[[A]]" if len(judge.bodies) % 2 else "Hm."
        with pytest.raises(EvaluationError, match="first 10 verdicts"):
            run("pair", concurrency=1)
        judge.says = lambda body: "[[B]]"
        judge.bodies.clear()
        rows = run("pair")
        assert len(judge.bodies) == 10
        assert {row["g1_winner"] for row in rows} == {"model_1"}

    def test_few_judgments_that_are_all_malformed_are_not_kept_either(self, judge, run, files):
        judge.says = lambda body: "Hm."
        with pytest.raises(EvaluationError, match="first 10 verdicts .*'Hm.'"):
            run()
        assert not (files.folder / "model_judgment").exists()
        judge.says = lambda body: "[[6]]"
        assert [row["score"] for row in run()] == [6] * 10 and len(judge.bodies) == 20

    def test_the_last_ones_may_be_malformed_if_earlier_ones_were_not(self, judge, run):
        """Started again, the judge gives no readable verdict any more; the file says it could."""
        judge.says = lambda body: "[[6]]" if len(judge.bodies) <= 7 else {"choices": []}
        with pytest.raises(JudgeError):
            run(concurrency=1, retries=0)
        judge.says = lambda body: "Hm."
        rows = run()
        assert [row["score"] for row in rows] == [6] * 7 + [-1] * 3
        asked = len(judge.bodies)
        assert run() == rows and len(judge.bodies) == asked

    def test_no_readable_judgment_gives_no_score(self, todo):
        rows = [{"question_id": q["question_id"], "turn": turn, "score": -1}
                for q in QUESTIONS for turn in (1, 2)]  # fmt: skip
        with pytest.raises(EvaluationError, match="none of 10 judgments"):
            score.single(rows, todo("single")[1])

    @pytest.mark.parametrize(
        ("malformed", "given", "allowed"),
        [(8, None, 8), (9, None, None), (9, 9, 9), (0, 0, 0), (1, 0, None)],
    )
    def test_how_many_may_be_malformed(self, tmp_path, malformed, given, allowed):
        rows = [
            {
                "question_id": i,
                "turn": 1,
                "score": -1 if i < malformed else 5,
                "judgment": f"Hm {i}",
            }
            for i in range(160)
        ]
        if allowed is not None:
            assert score.check_malformed(rows, given, tmp_path) == allowed
            return
        says = rf"{malformed} of 160 verdicts .*question 0, turn 1.*'Hm 0'.*--allow-malformed "
        with pytest.raises(EvaluationError, match=f"{says}{malformed}"):
            score.check_malformed(rows, given, tmp_path)


class TestResume:
    @pytest.mark.parametrize("mode", ["single", "pair"])
    def test_after_a_fault_only_the_rest_is_asked(self, judge, run, files, mode):
        """The server breaks after seven answers. What came is whole lines; no verdict is paid for
        twice, not even the first game of a pair whose second one was lost."""
        verdict = "[[6]]" if mode == "single" else "[[A]]"
        judge.says = lambda body: verdict if len(judge.bodies) <= 7 else {"choices": []}
        with pytest.raises(JudgeError, match="not a chat completion"):
            run(mode, concurrency=1, retries=0)
        file = files.folder / "model_judgment" / f"the--judge_{mode}.jsonl"
        text = file.read_text()
        assert text.endswith("\n") and len(text.splitlines()) == (7 if mode == "single" else 3)
        with file.open("a") as f:
            f.write('{"question_id": 99, "mod')
        judge.says = lambda body: verdict
        judge.bodies.clear()
        rows = run(mode)
        whole = 10 if mode == "single" else 20
        assert len(judge.bodies) == whole - 7 and len(rows) == 10
        assert len(file.read_text().splitlines()) == 10
        assert run(mode) == rows and len(judge.bodies) == whole - 7

    def test_repetitions_are_asked_anew_and_extend_what_is_there(self, judge, run, todo):
        judge.says = lambda body: f"[[{1 + len(judge.bodies) % 10}]]"
        once = run(repeats=1)
        thrice = run(repeats=3)
        assert thrice[:10] == once and len(judge.bodies) == 30
        assert [row["repeat"] for row in thrice] == [0] * 10 + [1] * 10 + [2] * 10
        found = score.single(thrice, todo("single")[1])
        assert found["overall"]["judgments"] == 30
        by_turn = {}
        for row in thrice:
            by_turn.setdefault((row["question_id"], row["turn"]), []).append(row["score"])
        assert found["spread"] == pytest.approx(
            np.mean([np.std(v, ddof=1) for v in by_turn.values()])
        )

    def test_verdicts_on_other_answers_are_not_taken_over(self, run, files):
        run()
        lines(files.one, answer_rows("one", "Something else"))
        with pytest.raises(EvaluationError, match="question 81, turn 1.*about other texts"):
            run()

    def test_nor_those_asked_for_otherwise(self, run):
        run()
        with pytest.raises(EvaluationError, match="'temperature': 0.0.*'temperature': 1.0"):
            run(sampling=judging.Sampling(temperature=1.0))

    def test_nor_those_asked_with_further_fields(self, judge, run):
        """Verdicts from before there was such an option say nothing of it, and are none of them."""
        first = run()
        assert "extra" not in first[0]["sampling"]
        more = judging.Sampling(extra={"max_tokens": None, "max_completion_tokens": 99})
        with pytest.raises(EvaluationError, match="max_completion_tokens"):
            run(sampling=more)

    def test_further_fields_are_sent(self, judge, run):
        run(sampling=judging.Sampling(extra={"max_tokens": None, "max_completion_tokens": 99}))
        assert {body.get("max_completion_tokens") for body in judge.bodies} == {99}
        assert not any("max_tokens" in body for body in judge.bodies)
        run(sampling=judging.Sampling(extra={"max_tokens": None, "max_completion_tokens": 99}))
        assert len(judge.bodies) == 10

    def test_two_models_share_a_judges_file(self, judge, run, files):
        run()
        first = (files.folder / "model_judgment/the--judge_single.jsonl").read_text()
        lines(files.one, answer_rows("three", "Another"))
        run()
        both = (files.folder / "model_judgment/the--judge_single.jsonl").read_text()
        assert both.startswith(first) and len(judge.bodies) == 20

    def test_a_line_that_is_not_ours(self, run, files):
        run()
        file = files.folder / "model_judgment/the--judge_single.jsonl"
        whole = file.read_text()
        file.write_text("not JSON\n" + whole)
        with pytest.raises(EvaluationError, match="single.jsonl, line 1"):
            run()
        file.write_text(whole + whole.split("\n")[0] + "\n")
        with pytest.raises(EvaluationError, match="line 11: .*appears twice"):
            run()


def as_fastchat(rows):
    """show_result's means, taken the plain way."""
    good = [row for row in rows if row["score"] != -1]
    mean = lambda turn: np.mean([row["score"] for row in good if turn in (None, row["turn"])])
    return mean(1), mean(2), mean(None)


class TestScores:
    def rows(self, rng, malformed=0.2):
        return [
            {"question_id": q["question_id"], "turn": turn, "repeat": k, "model": "one",
             "score": -1 if rng.random() < malformed else int(rng.integers(1, 11))}
            for k in range(3) for turn in (1, 2) for q in QUESTIONS
        ]  # fmt: skip

    def test_means_are_fastchats(self, files):
        questions = bench.read_questions(files.questions, unpublished=True)
        for seed in range(10):
            rows = self.rows(np.random.default_rng(seed))
            found = score.single(rows, questions)
            ours = (found["turn_1"], found["turn_2"], found["overall"])
            assert [each["score"] for each in ours] == pytest.approx(as_fastchat(rows))
            for each in (*ours, *found["categories"].values()):
                if each["low"] is None:  # a category of one question, or equal ratings
                    assert each["high"] is None and each not in ours
                else:
                    assert each["low"] <= each["score"] <= each["high"]

    def test_a_model_that_wins_everything_may_still_lose(self, files):
        """All turns of the questions are won: Wilson's interval of so many questions."""
        questions = bench.read_questions(files.questions, unpublished=True)
        rows = [
            {"question_id": q.id, "turn": turn, "g1_winner": "model_1", "g2_winner": "model_1"}
            for q in questions for turn in (1, 2)
        ]  # fmt: skip
        found = score.pair(rows, questions)
        theirs = stats.binomtest(len(questions), len(questions)).proportion_ci(method="wilson")
        assert found["overall"]["win_rate_adjusted"] == 1
        assert found["overall"]["low"] == pytest.approx(theirs.low)
        assert f"1.000  [{theirs.low:.3f}, 1.000]" in score.table("x", found)
        ten = [row | {"judgment": "", "score": 10} for row in rows]
        same = score.single(ten, questions)
        assert same["overall"]["low"] is None and "no interval" in score.table("x", same)

    def test_intervals_are_over_questions(self, shared):
        """80 questions that differ by their own mean, whose turns agree: the interval is that of 80
        numbers, not of the 160 or 480 that were given."""
        questions = bench.read_questions(shared / "mt_bench/question.jsonl")
        rng = np.random.default_rng(0)
        of_question = rng.normal(6, 1, 80)
        rows = [
            {"question_id": q.id, "turn": turn, "score": float(x)}
            for q, x in zip(questions, of_question, strict=True)
            for turn in (1, 2)
            for _ in range(3)
        ]
        found = score.single(rows, questions)["overall"]
        half = 1.96 * of_question.std(ddof=1) / np.sqrt(80)
        assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.05)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda rows: rows[:-1], "1 of 10 turns are missing, such as question 85, turn 2"),
            (lambda rows: [], "10 of 10 turns"),
            (lambda rows: [*rows, rows[0] | {"question_id": 7}], "of question 7"),
        ],
    )
    def test_partial_judgments(self, files, change, says):
        questions = bench.read_questions(files.questions, unpublished=True)
        with pytest.raises(EvaluationError, match=says):
            score.single(change(self.rows(np.random.default_rng(0))), questions)


def by_text(body):
    """A number that follows from what is asked."""
    return zlib.crc32(body["messages"][1]["content"].encode())


class TestFastChat:
    """FastChat's own show_result reads our files and gets our numbers."""

    @pytest.fixture
    def shows(self):
        module = pytest.importorskip("fastchat.llm_judge.show_result")

        def show(mode, file):
            args = SimpleNamespace(
                input_file=str(file), bench_name="mt_bench", model_list=None, baseline_model=None,
                judge_model="", mode=mode,
            )  # fmt: skip
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                getattr(module, f"display_result_{mode}")(args)
            return out.getvalue()

        return show

    def test_single(self, judge, run, files, todo, shows, published):
        ratings = ("[[3]]", "?", "[[9.5]]", "[[6]]", "Rating: [2]")
        judge.says = lambda body: ratings[by_text(body) % 5]
        rows = run(repeats=2)
        found = score.single(rows, todo("single")[1])
        shown = shows("single", files.folder / "model_judgment/the--judge_single.jsonl")
        theirs = [float(x) for x in re.findall(r"^one .*?(\d+\.\d+)$", shown, re.MULTILINE)]
        ours = [found[key]["score"] for key in ("turn_1", "turn_2", "overall")]
        assert theirs == pytest.approx(ours, abs=1e-6) and found["overall"]["malformed"]
        published("MT-Bench, FastChat's show_result on ours", f"single: {theirs}, equal")

    def test_pair(self, judge, run, files, todo, shows, published):
        verdicts = ("[[A]]", "[[B]]", "[[C]]", "[[B]]", "[[A]]", "no", "[[B]]")
        judge.says = lambda body: verdicts[by_text(body) % 7]
        found = score.pair(run("pair"), todo("pair")[1])["overall"]
        shown = shows("pairwise", files.folder / "model_judgment/the--judge_pair.jsonl")
        (line,) = re.findall(r"^one (.*)$", shown, re.MULTILINE)
        theirs = [float(x) for x in line.split()]
        keys = ("win", "loss", "tie", "win_rate", "loss_rate", "win_rate_adjusted")
        assert theirs == pytest.approx([found[key] for key in keys], abs=1e-6)
        assert found["malformed"] and found["win"] and found["loss"]
        published("MT-Bench, FastChat's show_result on ours", f"pair: {theirs}, equal")


class TestVerb:
    def verb(self, files, judge, *more):
        given = ["--questions", files.questions, "--prompts", files.prompts]
        given += ["--references", files.references, "-o", files.folder, "--unpublished"]
        given += ["--judge", "the/judge", "--base-url", judge.url, *more]
        return CliRunner().invoke(app, ["eval", "mt_bench", *map(str, given)])

    def test_from_a_model_to_scores(self, judge, files, model_folder):
        judge.says = lambda body: f"[[{1 + len(body['messages'][1]['content']) % 10}]]"
        more = (model_folder, "--max-new-tokens", 5, "--slots", 2, "--name", "mine")
        result = self.verb(files, judge, *more, "--dry-run")
        assert result.exit_code == 0, result.output
        assert not judge.bodies and not files.folder.exists()
        # 10 answers of 5 tokens; 10 calls
        shown = " ".join(result.output.split())
        for line in (
            r"answers 10 0 10",
            r"new tokens, at most 50 0 50",
            r"judge calls, at most 0 10 10",
        ):
            assert line in shown, result.output
        result = self.verb(files, judge, *more)
        assert result.exit_code == 0, result.output
        record = json.loads((files.folder / "the--judge_mine.json").read_text())
        assert record["benchmark"].startswith("not MT-Bench")
        assert f"overall      {record['overall']['score']:6.3f}" in result.output
        assert len(judge.bodies) == 10
        result = self.verb(files, judge, *more, "--dry-run")
        assert "exist already" in result.output
        again = self.verb(files, judge, *more)
        assert again.exit_code == 0 and len(judge.bodies) == 10

    def test_answers_against_answers(self, judge, files):
        judge.says = lambda body: "[[A]]"
        result = self.verb(files, judge, "--answers", files.one, "--against", files.two)
        assert result.exit_code == 0, result.output
        record = json.loads((files.folder / "the--judge_one_against_two.json").read_text())
        assert record["overall"]["tie"] == 10 and record["overall"]["win_rate_adjusted"] == 0.5

    def test_malformed_verdicts_are_an_error_unless_allowed(self, judge, files):
        judge.says = lambda body: (
            "[[A]]" if "Ask 0" not in body["messages"][1]["content"] else "I like both."
        )
        given = ("--answers", files.one, "--against", files.two)
        result = self.verb(files, judge, *given)
        file = files.folder / "model_judgment/the--judge_pair.jsonl"
        says = (
            f"{file}: 2 of 10 verdicts could not be read, more than the 0 allowed, such as the one "
        )
        assert says in str(result.exception) and "'I like both.'" in str(result.exception)
        assert not list(files.folder.glob("*.json"))
        assert len(file.read_text().splitlines()) == 10 and len(judge.bodies) == 20
        result = self.verb(files, judge, *given, "--allow-malformed", 2)
        assert result.exit_code == 0 and "2 malformed" in result.output, result.output
        record = json.loads((files.folder / "the--judge_one_against_two.json").read_text())
        assert record["overall"]["malformed"] == record["allow_malformed"] == 2
        assert len(judge.bodies) == 20

    def test_an_empty_last_line_is_no_judgment(self, judge, files):
        """One published file ends with such a line."""
        judge.says = lambda body: f"[[{1 + len(body['messages'][1]['content']) % 10}]]"
        assert self.verb(files, judge, "--answers", files.one).exit_code == 0
        file = files.folder / "model_judgment/the--judge_single.jsonl"
        record = files.folder / "the--judge_one.json"
        before, asked = json.loads(record.read_text()), len(judge.bodies)
        file.write_text(file.read_text() + "\n \n")
        result = self.verb(files, judge, "--answers", files.one)
        assert result.exit_code == 0 and len(judge.bodies) == asked, result.output
        assert json.loads(record.read_text()) == before

    def scored(self, files, *given):
        verb = ["eval", "mt_bench", "--questions", files.questions, "--unpublished", *given]
        return CliRunner().invoke(app, [*map(str, verb), "-o", str(files.folder / "again")])

    def test_judgments_are_scored_as_they_are(self, judge, files):
        ratings = ("[[7]]", "[[4.5]]", "[[1]]", "Well.")
        judge.says = lambda body: ratings[by_text(body) % 4]
        for answers in (files.one, files.two):
            more = ("--answers", answers, "--allow-malformed", 9)
            assert self.verb(files, judge, *more).exit_code == 0
        file = files.folder / "model_judgment/the--judge_single.jsonl"
        file.write_text(file.read_text().strip())  # no line feed at its end, as others write files
        asked = len(judge.bodies)
        for name in ("one", "two"):
            given = ("--judgments", file, "--name", name, "--allow-malformed", 9)
            result = self.scored(files, *given)
            assert result.exit_code == 0 and len(judge.bodies) == asked, result.output
            record, want = (
                json.loads((folder / f"the--judge_{name}.json").read_text())
                for folder in (files.folder / "again", files.folder)
            )
            assert {k: record[k] for k in record if k != "files"} == {
                k: v for k, v in want.items() if k not in ("files", "repeats", "sampling")
            }
            assert set(record["files"]) == {"questions", "judgments"}
        assert record["overall"]["malformed"]
        says = "judgments are about one, two; --name is not given"
        assert says in str(self.scored(files, "--judgments", file).exception)
        result = self.scored(files, "--judgments", file, "--name", "three")
        assert "--name is none of them" in str(result.exception)

    def test_judgments_of_pairs(self, judge, files):
        judge.says = lambda body: "[[A]]" if by_text(body) % 3 else "[[C]]"
        assert (
            self.verb(files, judge, "--answers", files.one, "--against", files.two).exit_code == 0
        )
        file = files.folder / "model_judgment/the--judge_pair.jsonl"
        result = self.scored(files, "--judgments", file)
        assert result.exit_code == 0 and "one against two" in result.output, result.output
        record, want = (
            json.loads((folder / "the--judge_one_against_two.json").read_text())
            for folder in (files.folder / "again", files.folder)
        )
        assert record["overall"] == want["overall"]

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda rows: [*rows, rows[0]], "row 10: .* appears twice"),
            (lambda rows: [rows[0] | {"score": "7"}, *rows[1:]], "row 0: .*expected a rating"),
            (lambda rows: [{"question_id": 81}, *rows[1:]], "row 0: not a verdict .*KeyError"),
            (lambda rows: rows[:-1], "judgments of 1 of 10 turns are missing"),
            (lambda rows: [rows[0] | {"judge": ["x", "y"]}, *rows[1:]], "several judges: j, x"),
        ],
    )
    def test_spoilt_judgments_are_named(self, files, spoil, says):
        rows = [
            {"question_id": i, "turn": turn, "model": "one", "judge": ["j", "p"], "score": 5}
            for turn in (1, 2) for i in range(81, 86)
        ]  # fmt: skip
        file = lines(files.folder / "j.jsonl", spoil(rows))
        result = self.scored(files, "--judgments", file)
        assert isinstance(result.exception, EvaluationError), result.output
        assert re.search(says, str(result.exception))

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ([], "give exactly one of MODEL, --answers, --judgments"),
            (["--judgments", "{one}"], "leave out --judge and --against"),
            (["--answers", "{one}", "--against", "{one}"], "the same model name, 'one'"),
            (["--answers", "{one}", "--references", "{one}x"], "cannot be read"),
        ],
    )
    def test_settings_that_cannot_be(self, judge, files, given, says):
        result = self.verb(files, judge, *(each.format(one=files.one) for each in given))
        assert says in str(result.exception) and not judge.bodies and not files.folder.exists()


def test_a_torn_line_goes_when_the_next_one_comes(tmp_path):
    file = tmp_path / "j.jsonl"
    file.write_text('{"k": 1}\n{"k": 2, "te')
    journal = Journal(file, lambda row: row["k"])
    assert list(journal.rows) == [1] and "te" in file.read_text()  # a reader changes nothing
    journal.add([{"k": 2}])
    journal.add([{"k": 3}])
    assert file.read_text() == '{"k": 1}\n{"k": 2}\n{"k": 3}\n'


def test_a_whole_last_line_counts_without_a_line_feed(tmp_path):
    file = tmp_path / "j.jsonl"
    file.write_text('{"k": 1}\n\n{"k": 2}')
    journal = Journal(file, lambda row: row["k"])
    assert list(journal.rows) == [1, 2]
    journal.add([{"k": 3}])
    assert file.read_text() == '{"k": 1}\n\n{"k": 2}\n{"k": 3}\n'
    assert list(Journal(file, lambda row: row["k"]).rows) == [1, 2, 3]


def test_a_journal_keeps_lines_whole_whatever_they_hold(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", lambda row: row["k"])
    rows = [{"k": i, "text": text} for i, text in enumerate(("a\u2028b\n", "\u0085", "\ud800", ""))]
    journal.add(rows)
    again = Journal(tmp_path / "j.jsonl", lambda row: row["k"])
    assert list(again.rows.values()) == rows
