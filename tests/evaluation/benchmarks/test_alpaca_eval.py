"""AlpacaEval: published annotations give the published numbers; other files are refused."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import logging
import random
import re
import warnings

import numpy as np
import pytest
from scipy import optimize
from typer.testing import CliRunner

from selm_jax.cli import app
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval import annotate, score
from selm_jax.evaluation.benchmarks.alpaca_eval import evaluate as alpaca
from selm_jax.evaluation.benchmarks.alpaca_eval import instructions as alpaca_eval_set
from selm_jax.evaluation.benchmarks.alpaca_eval import length_controlled as lc
from selm_jax.evaluation.benchmarks.alpaca_eval import published as lc_published
from selm_jax.evaluation.benchmarks.alpaca_eval.instructions import (
    BASELINE,
    Known,
    check_annotations,
    read_annotations,
    read_outputs,
    read_set,
)
from selm_jax.evaluation.model import Model
from selm_jax.feedback.judge.budget import JudgeError
from selm_jax.feedback.judge.client import Client
from selm_jax.shell.artifacts import ArtifactError

INSTRUCTIONS = ("Sing!", "What is a river?", 'Say {output_1} and {"a": 1}.', "Why?", "Count to 3.")
BASELINES = ("La la.", "Water that runs\u2028downhill.", "I say {output_2}.", "Because.", "1 2 3")
PROMPT = """<|im_start|>system
Judge.
<|im_end|>
<|im_start|>user
{instruction}
m: {output_1}
M: {output_2}
<|im_end|>
"""


@pytest.fixture
def known(monkeypatch):
    """A set of five instructions in place of the 805."""
    known = Known.of(INSTRUCTIONS, BASELINES)
    monkeypatch.setattr(alpaca_eval_set, "published", lambda: known)
    return known


@pytest.fixture
def set_file(tmp_path, known):
    rows = [
        {"dataset": f"d{i % 2}", "instruction": x, "output": y, "generator": BASELINE}
        for i, (x, y) in enumerate(zip(INSTRUCTIONS, BASELINES, strict=True))
    ]
    return dump(tmp_path / "baseline.json", rows)


@pytest.fixture
def prompt_file(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    return file


def dump(file, rows):
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return file


def outputs(texts=("La.", "Wet.", "No.", "Because.", "3 2 1"), **changes):
    rows = zip(INSTRUCTIONS, texts, strict=True)
    return [
        {"dataset": "", "instruction": x, "output": y, "generator": "mine"} | changes
        for x, y in rows
    ]


def annotations(**changes):
    rows = zip(INSTRUCTIONS, BASELINES, (1.0, 1.9, 1.5, 0, 2.0), strict=True)
    return [
        {
            "instruction": x, "output_1": y, "generator_1": BASELINE, "output_2": "word " * i,
            "generator_2": "mine", "annotator": "judge", "preference": p,
        } | changes
        for i, (x, y, p) in enumerate(rows)
    ]  # fmt: skip


class TestPublished:
    @pytest.mark.parametrize("name", ["gemma-2b-it", "FuseChat-Llama-3.2-1B-Instruct"])
    def test_the_leaderboards_figures(self, shared, published, name):
        rows = read_annotations(shared / "alpaca_eval" / name / "annotations.json")
        found = score.scores(rows)
        with (shared / "alpaca_eval/leaderboard.csv").open() as f:
            line = next(row for row in csv.DictReader(f) if row[""] == name)
        for key in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
            assert found[key] == int(line[key]), key
        rates = ("win_rate", "standard_error", "discrete_win_rate")
        for key in rates:
            # A double has 15 reliable digits. The 16th and 17th are the last bit of sums, in which
            # today's package differs from the file as well.
            assert f"{found[key]:.15g}" == f"{float(line[key]):.15g}", key
        shown = ", ".join(f"{key} {found[key]:.15g}" for key in rates)
        counts = f"n {found['n_wins']}/{found['n_draws']}/{found['n_wins_base']}"
        published(
            f"AlpacaEval 2, {name}", f"{shown}, {counts}, length {found['avg_length']}: equal"
        )
        answers = read_outputs(shared / "alpaca_eval" / name / "model_outputs.json")
        assert [row["output"] for row in answers] == [row["output_2"] for row in rows]

    def test_every_published_preference_follows_from_its_log_probabilities(self, shared, published):
        rows = read_annotations(shared / "alpaca_eval/gemma-2b-it/annotations.json")
        worst = 0.0
        for row in rows:
            content = row["raw_completion"]["logprobs"]["content"]
            first = {each["token"]: each["logprob"] for each in content[0]["top_logprobs"]}
            answer = annotate.Completion("M", (first,), None, "length")
            pair = (row["instruction"], row["output_1"])
            made = annotate._row(pair, {"dataset": "", "output": "", "generator": ""}, "", answer)
            worst = max(worst, abs(made["preference"] - row["preference"]))
        assert worst < 1e-9  # they are printed with ten digits
        published("AlpacaEval 2, preferences", f"805 from log-probabilities, off by {worst:.0e}")

    def test_the_shipped_digests_are_of_the_805(self, shared):
        rows = json.loads((shared / "alpaca_eval/gemma-2b-it/annotations.json").read_text())
        known = Known.of([r["instruction"] for r in rows], [r["output_1"] for r in rows])
        assert alpaca_eval_set.published() == known and len(set(known.instructions)) == 805

    def test_the_verb_on_an_annotation_file(self, shared, tmp_path, monkeypatch):
        file = shared / "alpaca_eval/gemma-2b-it/annotations.json"
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        result = CliRunner().invoke(
            app, ["eval", "alpaca_eval", "--annotations", str(file), "-o", str(tmp_path / "out")]
        )
        assert result.exit_code == 0, result.output
        assert "win rate              3.40 %" in result.output
        record = json.loads((tmp_path / "out" / annotate.OFFICIAL / "alpaca_eval.json").read_text())
        assert record["length_controlled_winrate"] is None
        assert "df_gamed.csv" in record["lc_refused"] and "--gamed" in record["lc_refused"]

    def test_another_order_of_the_805_is_seen(self, shared, tmp_path):
        prompts = shared / "alpaca_eval/prompts.jsonl"
        rows = [json.loads(line) for line in prompts.read_text().split("\n") if line]
        file = dump(tmp_path / "set.json", [{"instruction": row["prompt"]} for row in rows])
        with pytest.raises(
            EvaluationError, match="the instructions are in another order: row 0 has"
        ):
            read_set(str(file))


class TestWinRate:
    def test_as_the_package_takes_it(self):
        package = pytest.importorskip("alpaca_eval.metrics")
        rng = np.random.default_rng(0)
        for _ in range(20):
            x = rng.choice([0, 1, 1.5, 2, *(1 + rng.random(20))], size=rng.integers(2, 300))
            theirs = package.get_winrate([{"preference": float(each)} for each in x])
            ours = score.win_rate(x)
            assert set(ours) == set(theirs)
            for key, value in theirs.items():
                assert ours[key] == pytest.approx(value, rel=1e-13), key

    def test_no_preference_at_all(self):
        with pytest.raises(EvaluationError, match="no row has a preference"):
            score.win_rate(np.array([]))


def gamed_frame(rng, n=805):
    """Like df_gamed.csv: annotations of a concise and of a verbose baseline."""
    difficulty = rng.normal(0, 1, n)
    rows = []
    for name, shift in (("concise", 1.0), ("verbose", -1.0)):
        delta = rng.normal(shift, 0.5, n)
        p = 1 / (1 + np.exp(1.2 * np.tanh(delta) + 0.1 * rng.normal(size=n)))
        rows += [
            {
                "model": f"{BASELINE}_{name}", "preference": p[i], "index": i,
                "std_delta_len": delta[i], "instruction_difficulty": difficulty[i],
                "not_gamed_baseline": False,
            }
            for i in range(n)
        ]  # fmt: skip
    return rows


def write_csv(file, rows):
    with file.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return file


def longhand(rows, gamed):
    """The regression without its penalty, which at the C it chooses hardly counts; by BFGS."""
    delta = np.array([len(r["output_1"]) - len(r["output_2"]) for r in rows], float)
    own = np.stack([
        np.tanh(delta / delta.std(ddof=1)),
        [gamed[i]["instruction_difficulty"] for i in range(len(rows))],
        np.ones(len(rows)),
    ])  # fmt: skip
    theirs = np.array([
        [np.tanh(g["std_delta_len"]), g["instruction_difficulty"], 0.0] for g in gamed
    ]).T  # fmt: skip
    x = np.concatenate([theirs, own], 1)
    y = np.array([g["preference"] for g in gamed] + [(r["preference"] or 1.5) - 1 for r in rows])
    w = np.array([0.1] * len(gamed) + [1.0] * len(rows))

    def loss(coef):
        z = coef @ x
        return np.sum(w * (np.logaddexp(0, z) - y * z)) / len(y)

    coef = optimize.minimize(loss, np.zeros(3), tol=1e-12).x
    p = 1 / (1 + np.exp(-(coef[1:] @ own[1:])))
    return 100 * p.mean(), 100 * p.std(ddof=1) / np.sqrt(p.size)


def controlled(rows, gamed, c=None):
    places = range(len(rows))
    with lc.fitting(rows, places, gamed) as fit:
        return lc.described(fit(c), rows, places, gamed)


class TestLengthControlled:
    @pytest.fixture
    def rows(self, monkeypatch):
        pytest.importorskip("alpaca_eval.metrics")
        monkeypatch.setattr(lc, "_RESAMPLES", 200)
        rng = np.random.default_rng(1)
        return [
            {
                "output_1": "a" * rng.integers(100, 3000), "output_2": "a" * rng.integers(9, 2500),
                "generator_1": BASELINE, "generator_2": "mine", "annotator": "j", "index": 7,
                "preference": float(rng.choice([0, 1.2, 1 + rng.random(), rng.uniform(1, 1.3)])),
            }
            for _ in range(805)
        ]  # fmt: skip

    def test_it_is_the_regression_it_says(self, rows, tmp_path):
        gamed = gamed_frame(np.random.default_rng(2))
        file = write_csv(tmp_path / "df_gamed.csv", gamed)
        level = logging.getLogger().level
        found = controlled(rows, file)
        rate, error = longhand(rows, gamed)
        assert found["length_controlled_winrate"] == pytest.approx(rate, abs=0.05)
        assert found["lc_standard_error"] == pytest.approx(error, abs=0.01)
        import sklearn

        assert logging.getLogger().level == level
        assert not sklearn.get_config()["enable_metadata_routing"]
        assert controlled(rows, file) == found

    def test_why_order_is_checked(self, rows, tmp_path):
        """The package gives another number for the same rows in another order, and no sign."""
        file = write_csv(tmp_path / "df_gamed.csv", gamed_frame(np.random.default_rng(2)))
        shuffled = rows[:]
        random.Random(0).shuffle(shuffled)
        a, b = (controlled(each, file) for each in (rows, shuffled))
        assert abs(a["length_controlled_winrate"] - b["length_controlled_winrate"]) > 1e-3

    @pytest.mark.parametrize("c", [0.005, 2.78, 1e4])
    def test_a_refit_is_the_penalised_minimum(self, rows, tmp_path, c):
        """Against liblinear, called as by the package except for the tolerance. With the smallest C
        some weights are 0."""
        from sklearn.linear_model import LogisticRegression

        gamed = write_csv(tmp_path / "df_gamed.csv", gamed_frame(np.random.default_rng(2)))
        rows[3]["preference"] = None
        data, rng = lc.Regression.of(rows, range(805), gamed), np.random.default_rng(0)
        counts = rng.multinomial(805, np.full(805, 1 / 805), 3)
        weight = np.tile(data.weight, (3, 1))
        weight[:, :805] *= counts
        found = lc.refit(data, weight, c, np.zeros(3))
        x, y = np.tile(data.features, (2, 1)), np.repeat([1, 0], len(data.wins))
        for ours, w in zip(found, weight, strict=True):
            w = np.concatenate([w * data.wins, w * (1 - data.wins)])
            model = LogisticRegression(
                C=c, l1_ratio=1, solver="liblinear", fit_intercept=False, tol=1e-9, max_iter=10_000,
                random_state=0,
            ).fit(x, y, sample_weight=w)  # fmt: skip
            np.testing.assert_allclose(ours, model.coef_[0], atol=2e-4)
        assert (found == 0).any() == (c == 0.005)

    def test_the_interval_is_of_the_rate_and_not_of_the_predictions(self, rows, tmp_path):
        gamed = write_csv(tmp_path / "df_gamed.csv", gamed_frame(np.random.default_rng(2)))
        found = controlled(rows, gamed)
        low, high = (found[f"length_controlled_winrate_{end}"] for end in ("low", "high"))
        assert low < found["length_controlled_winrate"] < high
        assert high - low == pytest.approx(2 * 1.96 * found["lc_bootstrap_error"], rel=0.1)
        assert found["lc_bootstrap_error"] > 1.5 * found["lc_standard_error"]
        shown = score.table("m", score.scores(rows) | found)
        assert (
            f"length-controlled   {found['length_controlled_winrate']:6.2f} %  [{low:.2f}, "
            in shown
        )

    def test_all_lost_is_no_certainty(self, rows, tmp_path):
        gamed = write_csv(tmp_path / "df_gamed.csv", gamed_frame(np.random.default_rng(2)))
        lost = [row | {"preference": 1.0} for row in rows]
        found = controlled(lost, gamed, lc_published.USUAL_C)
        assert found["length_controlled_winrate"] < 0.5
        assert 0 <= found["length_controlled_winrate_low"] < 0.2
        assert 0.4 < found["length_controlled_winrate_high"] < 1

    def test_the_interval_holds_the_rate_of_all_instructions(self, tmp_path, monkeypatch):
        """Instructions are drawn: the truth is the mean over all that might have been."""
        rng, theta, psi, n = np.random.default_rng(5), -0.8, 1.0, 150
        monkeypatch.setattr(lc, "_RESAMPLES", 100)
        sigmoid = lambda z: 1 / (1 + np.exp(-z))
        truth = 100 * sigmoid(theta + psi * rng.normal(size=200_000)).mean()
        held = held_by_theirs = 0
        for _ in range(100):
            hard, delta = rng.normal(size=n), rng.normal(0.3, 1, n)
            x = np.stack([np.tanh(delta / delta.std(ddof=1)), hard, np.ones(n)], 1)
            y = rng.binomial(1, sigmoid(x @ [-1, psi, theta])).astype(float)
            data = lc.Regression(x, y, np.ones(n), n)
            weights = lc.refit(data, np.ones((1, n)), 1e4, np.zeros(3))[0]
            p = sigmoid(x[:, 1:] @ weights[1:])
            spread = 100 * p.std(ddof=1) / np.sqrt(n)
            fit = lc.Fit(100 * p.mean(), spread, 1e4, tuple(weights), False)
            _, low, high = lc.interval(data, fit)
            held += low <= truth <= high
            held_by_theirs += abs(truth - fit.rate) <= 1.96 * spread
        assert held >= 89 and held_by_theirs < 80  # a share of 100 varies by 2

    def test_its_data_are_known_by_their_digest(self, tmp_path):
        file = write_csv(tmp_path / "df_gamed.csv", gamed_frame(np.random.default_rng(2), 5))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        with pytest.raises(EvaluationError, match=f"--gamed-sha256 {digest}"):
            lc.gamed_file(str(file))
        assert lc.gamed_file(str(file), digest.upper()) == file
        with pytest.raises(EvaluationError, match="no such file"):
            lc.gamed_file(str(tmp_path / "none.csv"))
        other = write_csv(tmp_path / "other.csv", [{"index": 0, "model": "x"}])
        with pytest.raises(EvaluationError, match="columns instruction_difficulty, not_gamed"):
            lc.gamed_file(str(other), hashlib.sha256(other.read_bytes()).hexdigest())

    def test_without_its_data_the_raw_rate_stands(self, known, monkeypatch):
        monkeypatch.setenv("HF_HUB_CACHE", "nowhere")
        found = alpaca.numbers(check_annotations(annotations(), "here"), None)
        assert found["win_rate"] == pytest.approx(100 * (0 + 0.9 + 0.5 + 0.5 + 1) / 5)
        assert found["length_controlled_winrate"] is None and "df_gamed" in found["lc_refused"]
        with pytest.raises(EvaluationError, match="no such file"):  # asked for, so an error
            alpaca.numbers(check_annotations(annotations(), "here"), "nowhere.csv")


def moved(rows):
    return [rows[1], rows[0], *rows[2:]]


def with_row(i, **changes):
    return lambda rows: [row | (changes if k == i else {}) for k, row in enumerate(rows)]


BAD_SETS = [
    (moved, "another order: row 0 has number 1"),
    (lambda rows: rows[:-1], "instructions 4 of 5 are missing"),
    (lambda rows: [*rows, rows[2]], "instructions 2 appear more than once"),
    (lambda rows: [*rows[:-1], rows[0]], "instructions 4 .*missing; instructions 0 .*than once"),
    (with_row(3, instruction="Why not?"), "3 of 5 .*; .* rows 3 are not AlpacaEval's, .*'Why not"),
    (with_row(3, instruction="Why? "), "rows 3 are not AlpacaEval's"),
    (with_row(3, instruction=None), "row 3: 'instruction' is None"),
]


class TestBadFiles:
    @pytest.mark.parametrize(("change", "says"), BAD_SETS)
    def test_instructions_of_annotations_of_answers_and_of_the_set(
        self, known, tmp_path, change, says
    ):
        with pytest.raises(EvaluationError, match=says):
            check_annotations(change(annotations()), "here")
        file = dump(tmp_path / "rows.json", change(outputs()))
        with pytest.raises(EvaluationError, match=says):
            read_outputs(file)
        with pytest.raises(EvaluationError, match=says):
            read_set(str(file))

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (
                with_row(2, generator_1="text_davinci_003"),
                "generator_1 is gpt4.*, text_davinci_003",
            ),
            (
                lambda rows: [r | {"generator_1": "gpt4"} for r in rows],
                "against 'gpt4'.*'gpt4_1106",
            ),
            (lambda rows: [r | {"generator_2": BASELINE} for r in rows], "against itself"),
            (with_row(1, generator_2="other"), "generator_2 is mine, other"),
            (with_row(1, annotator="other"), "annotator is judge, other"),
            (with_row(0, output_1="La la"), "1 answers of the baseline are not .*rows 0"),
            (with_row(1, preference=float("nan")), "1 of 5 preferences are missing .rows 1"),
            (with_row(1, preference=None), "--allow-missing 1"),
            (with_row(4, preference=2.5), "row 4: preference is 2.5"),
            (with_row(4, preference=0.5), "row 4: preference is 0.5"),
            (with_row(4, preference="2"), "row 4: preference is '2'"),
            (with_row(4, preference=True), "row 4: preference is True"),
            (with_row(4, output_2=None), "row 4: 'output_2' is None"),
        ],
    )
    def test_annotations(self, known, change, says):
        with pytest.raises(EvaluationError, match=says):
            check_annotations(change(annotations()), "here")

    def test_missing_preferences_may_be_allowed_and_are_counted(self, known):
        rows = check_annotations(with_row(1, preference=None)(annotations()), "here", None, 1)
        found = score.scores(rows)
        assert found["missing"] == 1 and found["n_total"] == 4

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (with_row(1, output=None), "row 1: 'output' is None"),
            (with_row(1, generator="other"), "generator is mine, other"),
            (lambda rows: [r | {"generator": BASELINE} for r in rows], "of the baseline"),
        ],
    )
    def test_answers(self, known, tmp_path, change, says):
        with pytest.raises(EvaluationError, match=says):
            read_outputs(dump(tmp_path / "rows.json", change(outputs())))

    def test_absent_rows_are_accepted_only_if_allowed_and_are_counted(self, known, tmp_path):
        """Published files lack rows as well as preferences."""
        rows = with_row(1, preference=None)(annotations())
        gone = [row for i, row in enumerate(rows) if i != 3]
        with pytest.raises(EvaluationError, match="instructions 3 of 5.*--allow-missing 1"):
            check_annotations(gone, "here")
        with pytest.raises(EvaluationError, match="1 instructions have no row.*--allow-missing 2"):
            check_annotations(gone, "here", allow_missing=1)
        found = check_annotations(gone, "here", allow_missing=2)
        assert alpaca_eval_set.places(found) == [0, 1, 2, 4]
        numbers = score.scores(found)
        assert (numbers["n_total"], numbers["missing"]) == (3, 2)
        assert numbers["win_rate"] == pytest.approx(100 * (0 + 0.5 + 1) / 3)
        for spoil, says in (
            (moved, "in another order"), (lambda rows: [*rows, rows[0]], "more than once"),
            (with_row(2, output_1="La."), "1 answers of the baseline are not"),
        ):  # fmt: skip
            with pytest.raises(EvaluationError, match=says):
                check_annotations(spoil(gone), "here", allow_missing=5)
        file = dump(tmp_path / "annotations.json", gone)
        verb = ["eval", "alpaca_eval", "--annotations", str(file), "--allow-missing", "2"]
        result = CliRunner().invoke(app, verb)
        assert result.exit_code == 0 and "no preference in    2 instructions" in result.output
        nothing = [row | {"preference": None} for row in annotations()]
        with pytest.raises(EvaluationError, match="no row has a preference"):
            check_annotations(nothing, "here", allow_missing=5)

    @pytest.mark.parametrize("text", ["", "[]", "{", "[1]", '{"a": 1}\n{"b"', "\xff"])
    def test_no_json(self, known, tmp_path, text):
        file = tmp_path / "rows.json"
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(EvaluationError, match="rows.json"):
            read_outputs(file)

    def test_a_baseline_that_is_not_the_published_one(self, set_file):
        rows = json.loads(set_file.read_text())
        dump(set_file, with_row(2, output="changed")(rows))
        with pytest.raises(EvaluationError, match="not the published ones .*rows 2"):
            read_set(str(set_file))
        dump(set_file, [row | {"generator": "someone"} for row in rows])
        assert read_set(str(set_file)).baseline is None  # good enough to answer, not to judge


DECODING = alpaca.Decoding(max_new_tokens=5)


class TestAnswers:
    @pytest.mark.slow
    def test_what_the_official_package_takes(self, model, set_file, tmp_path):
        file = alpaca.answer(model, read_set(str(set_file)), tmp_path / "out", DECODING, "mine")
        rows = json.loads(file.read_text())
        assert [list(row) for row in rows] == [
            ["dataset", "instruction", "output", "generator"]
        ] * 5
        assert [row["instruction"] for row in rows] == list(INSTRUCTIONS)
        assert {row["generator"] for row in rows} == {"mine"}
        assert rows == read_outputs(file)
        alone = model.reply(
            [[alpaca.Message("user", INSTRUCTIONS[3])]], max_new_tokens=5, temperature=0.7
        )
        assert rows[3]["output"] == alone[0][0].text.strip()

    def test_it_goes_on_from_what_is_there(self, model, set_file, tmp_path, monkeypatch):
        texts = read_set(str(set_file))
        whole = alpaca.answer(model, texts, tmp_path / "whole", DECODING).read_bytes()
        asked = []
        answer = Model.reply

        def stops(self, conversations, **settings):
            asked.append(len(conversations))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return answer(self, conversations, **settings)

        monkeypatch.setattr(Model, "reply", stops)
        monkeypatch.setattr(alpaca, "chunks", lambda items, _: [items[:2], items[2:]])
        folder = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            alpaca.answer(model, texts, folder, DECODING)
        assert not (folder / "model_outputs.json").exists()
        with (folder / "answers.jsonl").open("ab") as f:
            f.write(b'{"index": 4, "instr')  # torn by a kill
        assert alpaca.cost_of_answers(model, texts, folder, DECODING).answers == 3
        other = alpaca.Decoding(max_new_tokens=7)
        with pytest.raises(ArtifactError, match="max_new_tokens was 5 and is now 7"):
            alpaca.answer(model, texts, folder, other)
        assert alpaca.answer(model, texts, folder, DECODING).read_bytes() == whole
        assert asked == [2, 3, 2, 1]  # the second three never came
        assert alpaca.answer(model, texts, folder, DECODING).read_bytes() == whole
        assert len(asked) == 4

    def test_what_leaves_no_room_is_found_before_anything_is_drawn(self, model, set_file, tmp_path):
        with pytest.raises(EvaluationError, match="instruction 2 .*only 512 in total. Lower --max"):
            alpaca.answer(model, read_set(str(set_file)), tmp_path, alpaca.Decoding(500))
        assert not (tmp_path / "stage.json").exists()

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (
                ["--judge", "j", "--base-url", "http://127.0.0.1:9/v1"],
                "no answers of the baseline gpt4",
            ),
            (["--gamed", "nowhere.csv"], "nowhere.csv: no such file"),
            (["--judge", "j", "--key-env", "NOT_SET"], "no server|NOT_SET"),
            (["--judge", "j", "--prompt", "nowhere.txt"], "nowhere.txt cannot be read"),
            (["--judge", "j", "--extra", "top_p"], "--extra 'top_p': expected key=value"),
        ],
    )
    def test_nothing_is_drawn_if_the_rest_cannot_be(
        self, set_file, prompt_file, model_folder, tmp_path, monkeypatch, given, says
    ):
        monkeypatch.setattr(Model, "reply", lambda *_, **__: pytest.fail("a token was drawn"))
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        if "baseline" in says:
            rows = json.loads(set_file.read_text())
            dump(set_file, [{"instruction": row["instruction"]} for row in rows])
        verb = ["eval", "alpaca_eval", str(model_folder), "--instructions", str(set_file)]
        if "--prompt" not in given:
            verb += ["--prompt", str(prompt_file)]
        out = tmp_path / "out"
        result = CliRunner().invoke(app, [*verb, *given, "-o", str(out)])
        assert re.search(says, str(result.exception)) and not (out / "answers.jsonl").exists()

    def test_nothing_is_drawn_before_the_instructions_are_verified(
        self, set_file, model_folder, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(Model, "reply", lambda *_, **__: pytest.fail("a token was drawn"))
        dump(set_file, moved(json.loads(set_file.read_text())))
        out = tmp_path / "out"
        verb = ["eval", "alpaca_eval", str(model_folder), "--instructions", str(set_file)]
        result = CliRunner().invoke(app, [*verb, "-o", str(out)])
        assert isinstance(result.exception, EvaluationError) and not out.exists()


def by_hash(body):
    """Log-probabilities that follow from the request alone."""
    h = hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).digest()
    return {"m": -0.1 - h[0] / 99, "M": -0.1 - h[1] / 99, "The": -9.0}


def ask(judge, tmp_path, set_file, prompt_file, rows, name="judge-1"):
    client = Client(name, cache=tmp_path / "judge.sqlite", base_url=judge.url, backoff=0.01)
    texts, prompt = read_set(str(set_file)), annotate.read_prompt(prompt_file)
    return asyncio.run(annotate.ask(texts, rows, client, prompt))


class TestJudge:
    def test_requests_and_preferences(self, judge, tmp_path, set_file, prompt_file):
        judge.says = lambda body: {"M": -0.2, "m": -1.5, "x": -4.0}
        rows = ask(judge, tmp_path, set_file, prompt_file, outputs())
        assert len(judge.bodies) == 4  # the fourth answer equals the baseline's
        p = np.exp(-0.2) / (np.exp(-0.2) + np.exp(-1.5))  # of what is shown second
        for i, row in enumerate(rows):
            switched = annotate.is_switched(INSTRUCTIONS[i])
            expected = 1.5 if i == 3 else 2 - p if switched else 1 + p
            assert row["preference"] == pytest.approx(expected, abs=1e-12)
        assert len({annotate.is_switched(text) for text in INSTRUCTIONS}) == 2
        body = next(b for b in judge.bodies if "river" in b["messages"][1]["content"])
        assert body | {"messages": None} == {
            "model": "judge-1", "messages": None, "max_tokens": 1, "temperature": 0.0,
            "top_p": 1.0, "logprobs": True, "top_logprobs": 5,
        }  # fmt: skip
        assert check_annotations(rows, "here")
        assert {row["annotator"] for row in rows} == {
            f"weighted_judge-1_prompt_{hashlib.sha256(PROMPT.encode()).hexdigest()[:8]}"
        }

    def test_through_the_package_it_is_the_same(
        self, judge, tmp_path, set_file, model, monkeypatch
    ):
        """The package sends the same requests, with its own prompt, and gets the same preferences.

        It reads the file that our answers are written to.
        """
        pytest.importorskip("alpaca_eval")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
        judge.says = by_hash
        texts = read_set(str(set_file))
        file = alpaca.answer(model, texts, tmp_path / "out", DECODING, "mine")
        rows = read_outputs(file)
        with score.package("utils") as utils:
            assert utils.load_or_convert_to_dataframe(file).to_dict("records") == rows
        # The package fills a template place by place, so that a text with {output_1} in it is
        # filled again. Ours is not; the two agree on all other texts.
        keep = [i for i, text in enumerate(INSTRUCTIONS) if "{" not in text]
        some = alpaca_eval_set.EvalSet(
            tuple(texts.rows[i] for i in keep), tuple(BASELINES[i] for i in keep), "here"
        )
        rows = [rows[i] for i in keep]
        client = Client(
            annotate.OFFICIAL_JUDGE, cache=tmp_path / "judge.sqlite", base_url=judge.url
        )
        ours = asyncio.run(annotate.ask(some, rows, client, annotate.read_prompt()))
        sent, judge.bodies = judge.bodies, []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = annotate.ask_package(
                some, rows, annotate.OFFICIAL, tmp_path / "package_cache.json"
            )
        by_text = lambda body: body["messages"][1]["content"]
        assert sorted(sent, key=by_text) == sorted(judge.bodies, key=by_text) and len(sent) == 4
        for a, b in zip(ours, theirs, strict=True):
            assert a["preference"] == pytest.approx(b["preference"], abs=1e-12)
            for key in ("instruction", "output_1", "output_2", "generator_1", "generator_2"):
                assert a[key] == b[key], key
            assert a["annotator"] == b["annotator"] == annotate.OFFICIAL
        assert json.dumps(theirs)
        part = Known.of(some.instructions, some.baseline)
        assert score.scores(check_annotations(ours, "", part)) == pytest.approx(
            score.scores(check_annotations(theirs, "", part))
        )

    def test_a_judge_in_prose_gives_no_annotations(self, judge, tmp_path, set_file, prompt_file):
        judge.says = lambda body: {"I": -0.1, "The": -3.0}
        verb = ["eval", "alpaca_eval", "--instructions", str(set_file), "--judge", "judge-1"]
        verb += ["--prompt", str(prompt_file), "--base-url", judge.url]
        verb += ["--outputs", str(dump(tmp_path / "answers.json", outputs()))]
        out = tmp_path / "out"
        result = CliRunner().invoke(app, [*verb, "-o", str(out)])
        assert isinstance(result.exception, JudgeError)
        assert "4 of the first 4 answers could not be read" in str(result.exception)
        assert "('I', 'The') are neither 'm' nor 'M'" in str(result.exception)
        assert sorted(p.name for p in out.iterdir()) == [".lock", ".selm", "judge.sqlite"]
        result = CliRunner().invoke(app, [*verb, "-o", str(out), "--allow-missing", "4"])
        assert result.exit_code == 0, result.output
        assert "no preference in    4 instructions" in result.output
        judge.says = by_hash  # it is mended, and nothing that could not be used was kept
        calls = len(judge.bodies)
        result = CliRunner().invoke(app, [*verb, "-o", str(out)])
        assert result.exit_code == 0 and len(judge.bodies) == calls + 4

    @pytest.mark.parametrize("allowed", [0, 10])
    def test_a_judge_that_never_says_m_is_not_asked_for_all(
        self, judge, tmp_path, prompt_file, allowed
    ):
        texts = [f"Question {i}?" for i in range(120)]
        some = alpaca_eval_set.EvalSet(
            tuple(("", text) for text in texts), tuple("yes" for _ in texts), "here"
        )
        rows = [{"dataset": "", "output": "no", "generator": "mine"} for _ in texts]
        judge.says = lambda body: {"The": -0.1, "I": -3.0}
        client = Client("prose", cache=tmp_path / "judge.sqlite", base_url=judge.url, backoff=0.01)
        prompt = annotate.read_prompt(prompt_file)
        with pytest.raises(JudgeError, match="answers could not be read.*--allow-missing"):
            asyncio.run(annotate.ask(some, rows, client, prompt, allow_missing=allowed))
        assert 20 + allowed <= len(judge.bodies) <= 20 + allowed + client.concurrency

    def test_a_server_without_log_probabilities(self, judge, tmp_path, set_file, prompt_file):
        judge.says = lambda body: "M"
        with pytest.raises(JudgeError, match="no log-probabilities"):
            ask(judge, tmp_path, set_file, prompt_file, outputs())

    def test_the_official_name_is_for_the_official_judge_and_prompt_alone(self, prompt_file):
        ours = annotate.read_prompt(prompt_file)
        assert ours.annotator(annotate.OFFICIAL_JUDGE) != annotate.OFFICIAL
        pytest.importorskip("alpaca_eval")
        theirs = annotate.read_prompt()
        assert theirs.official and theirs.annotator(annotate.OFFICIAL_JUDGE) == annotate.OFFICIAL
        assert theirs.annotator("llama") == "weighted_llama"
        more = theirs.annotator(annotate.OFFICIAL_JUDGE, {"max_tokens": None})
        assert more not in (annotate.OFFICIAL, theirs.annotator("llama", {"max_tokens": None}))
        assert more != theirs.annotator(annotate.OFFICIAL_JUDGE, {"top_p": 0.5})


class TestVerb:
    @pytest.mark.slow
    def test_all_805_through_a_judge(self, shared, judge, tmp_path, prompt_file):
        judge.says = by_hash
        folder = shared / "alpaca_eval/gemma-2b-it"
        verb = ["eval", "alpaca_eval", "--outputs", folder / "model_outputs.json"]
        verb += ["--instructions", folder / "annotations.json", "--prompt", prompt_file]
        verb += ["--judge", "j", "--base-url", judge.url, "-o", tmp_path / "out"]
        result = CliRunner().invoke(app, list(map(str, verb)))
        assert result.exit_code == 0 and len(judge.bodies) == 805, result.output
        (file,) = (tmp_path / "out").glob("*/annotations.json")
        assert score.scores(read_annotations(file))["n_total"] == 805

    def test_from_a_model_to_the_leaderboard(
        self, judge, tmp_path, set_file, prompt_file, model_folder
    ):
        judge.says = by_hash
        out = tmp_path / "out"
        verb = ["eval", "alpaca_eval", str(model_folder), "--instructions", str(set_file)]
        verb += ["--judge", "judge-1", "--base-url", judge.url, "--prompt", str(prompt_file)]
        verb += ["--max-new-tokens", "5", "--slots", "2", "-o", str(out)]
        result = CliRunner().invoke(app, [*verb, "--dry-run"])
        assert result.exit_code == 0 and not judge.bodies and not out.exists()
        shown = " ".join(result.output.split())
        # 5 answers of 5 tokens; 5 calls
        for line in ("answers 5 0 5", "new tokens, at most 25 0 25", "judge calls, at most 0 5 5"):
            assert line in shown, result.output
        result = CliRunner().invoke(app, verb)
        assert result.exit_code == 0, result.output
        (folder,) = out.glob("weighted_judge-1*")
        record = json.loads((folder / "alpaca_eval.json").read_text())
        assert folder.name == record["annotator"]
        rows = read_annotations(folder / "annotations.json")
        (line,) = csv.DictReader((folder / "leaderboard.csv").read_text().splitlines())
        assert line[""] == record["model"] == "tiny-model"
        assert float(line["win_rate"]) == record["win_rate"] == score.scores(rows)["win_rate"]
        calls = len(judge.bodies)
        assert CliRunner().invoke(app, verb).exit_code == 0 and len(judge.bodies) == calls
        more = ["--extra", "max_tokens=null", "--extra", "max_completion_tokens=9"]
        assert CliRunner().invoke(app, [*verb, *more]).exit_code == 0
        assert len(judge.bodies) == 2 * calls and "max_tokens" not in judge.bodies[-1]
        assert judge.bodies[-1]["max_completion_tokens"] == 9
        assert len([*out.glob("weighted_judge-1*")]) == 2

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ([], "give exactly one of MODEL, --outputs, --annotations"),
            (["m", "--outputs", "x"], "give exactly one of MODEL"),
            (["m", "--judge", "a", "--annotator", "b"], "one of them"),
        ],
    )
    def test_settings_that_contradict(self, given, says):
        result = CliRunner().invoke(app, ["eval", "alpaca_eval", *given])
        assert says in str(result.exception)
