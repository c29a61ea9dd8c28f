"""Held-out measures against exact enumeration of the first token, and with models swapped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny import PROMPTS

from selm_jax.evaluation import EvaluationError, heldout
from selm_jax.evaluation.answers import Asked, read
from selm_jax.evaluation.contestants import contestants
from selm_jax.evaluation.model import find, open_found
from selm_jax.feedback import ranker as rankers
from selm_jax.feedback.judge.budget import JudgeError
from selm_jax.models.decoder import Decoder
from selm_jax.text.conversations import Message, Prompt
from selm_jax.weights.huggingface import load

QUIET = Console(quiet=True)
ASKED = rankers.Question("?", (), {}, "x")
BETA = 0.2


def prompts_with(swap: bool = False) -> list[Prompt]:
    pairs = [(f"I like the {i}th one.", f"No, {i} is too many of them.") for i in range(12)]
    return [
        Prompt(f"p{i}", (Message("user", text),), *(pair[::-1] if swap else pair))
        for i, (text, pair) in enumerate(zip(PROMPTS, pairs, strict=False))
    ]


@pytest.fixture
def evaluated(folders, tmp_path):
    def run(names, *, prompts=None, asked=None, out="out", ranker=None, **more):
        found = contestants(names, iteration=None, revision=None, files=False)
        more = {"beta": BETA, "console": QUIET} | more
        return heldout.run(
            found, prompts or prompts_with(), ranker or rankers.build_ranker("length", target=5),
            open_model=lambda f: open_found(f, slots=48, console=QUIET),
            reference=find(str(folders[1])), asked=asked or Asked(1, 2, 8),
            out=tmp_path / out, keep=tmp_path / "kept", **more,
        )  # fmt: skip

    return run


def first_token(folder, model, all_logits) -> np.ndarray:
    """log-probabilities of each prompt's first answer token, [prompts, vocab]."""
    params = load(folder, model.config)
    ids = model.prompt_ids([p.messages for p in prompts_with()])
    rows = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, each in zip(rows, ids, strict=True):
        row[: len(each)] = each
    logits = all_logits(Decoder(model.config), params, jnp.asarray(rows))
    last = np.array([len(each) - 1 for each in ids])
    return np.asarray(jax.nn.log_softmax(logits)[np.arange(len(ids)), last], np.float64)


def test_kl_and_entropy_are_those_of_the_distributions(folders, model, evaluated, all_logits):
    """With answers of one token both can be summed over the vocabulary."""
    policy, reference = (first_token(f, model, all_logits) for f in folders)
    kl = np.sum(np.exp(policy) * (policy - reference), axis=1).mean()
    entropy = -np.sum(np.exp(policy) * policy, axis=1).mean()
    report = evaluated([f"one={folders[0]}"], asked=Asked(0, 200, 1))
    found = report["contestants"]["one"]["measures"]
    for name, exact in (("kl", kl), ("entropy", entropy)):
        assert abs(found[name]["mean"] - exact) < 0.1 * exact + 0.02, name
    # and the error of 200 samples is what it says: some, and less than the thing itself
    assert 0 < found["kl"]["stderr"] < kl


def test_a_model_is_no_distance_from_itself(folders, evaluated):
    found = evaluated([f"two={folders[1]}"])["contestants"]["two"]["measures"]
    assert found["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert found["margins"]["mean"] == pytest.approx(0, abs=1e-5)


def test_pairs_swapped_are_wrong_as_often_as_they_were_right(folders, evaluated):
    right, wrong = (
        evaluated([f"one={folders[0]}"], prompts=prompts_with(swap), out=str(swap))["contestants"][
            "one"
        ]["measures"]
        for swap in (False, True)
    )
    assert right["margins"]["mean"] == pytest.approx(-wrong["margins"]["mean"], abs=1e-5)
    assert right["accuracy"]["mean"] == pytest.approx(1 - wrong["accuracy"]["mean"])


def test_files_tell_what_the_report_says(folders, evaluated, tmp_path):
    report = evaluated([f"one={folders[0]}", f"two={folders[1]}"])
    one = pq.read_table(tmp_path / "out" / "one-0.parquet").to_pylist()
    greedy = [row for row in one if row["kind"] == "greedy"]
    scores = [-abs(len(row["text"]) - 5) for row in greedy]
    measures = report["contestants"]["one"]["measures"]
    assert measures["reward_greedy"]["mean"] == pytest.approx(np.mean(scores))
    assert measures["cut_off"]["mean"] == np.mean([row["finish"] == "length" for row in greedy])
    kl = np.mean([r["logp"] - r["logp_start"] for r in one if r["kind"] == "sample"])
    assert measures["kl"]["mean"] == pytest.approx(kl, abs=1e-6)
    two = report["contestants"]["two"]
    gap = two["measures"]["kl"]["mean"] - measures["kl"]["mean"]
    assert two["minus_first"]["kl"]["mean"] == pytest.approx(gap)
    assert json.loads((tmp_path / "out" / "heldout.json").read_text()) == report


def test_seeds_of_one_method_are_pooled_by_prompt(folders, evaluated):
    a, b = map(str, folders)
    report = evaluated([f"both={a},{b}", f"same={a},{a}", f"alone={a}"])["contestants"]
    both, same, alone = (report[n]["measures"]["kl"] for n in ("both", "same", "alone"))
    assert both["mean"] == pytest.approx((alone["mean"] + 0) / 2, abs=1e-5)
    assert same["stderr"] == pytest.approx(alone["stderr"], rel=0.06)
    assert len(report["both"]["by_seed"]["kl"]) == 2
    # alone against the mean of both seeds, prompt by prompt
    assert report["alone"]["minus_first"]["kl"]["mean"] == pytest.approx(
        alone["mean"] / 2, abs=1e-5
    )


def test_a_dry_run_computes_nothing(folders, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("selm_jax.policy.policy.Policy.answer", None)
    monkeypatch.setattr("selm_jax.policy.policy.Policy.logps", None)
    seen = Console(record=True, width=160)
    evaluated([f"one={folders[0]}"], dry_run=True, console=seen)
    shown = seen.export_text()
    assert " 36 " in shown and str(36 * 8) in shown
    assert not list(tmp_path.iterdir())


def test_a_ranker_that_only_compares_sees_each_answer_beside_the_references(folders, evaluated):
    part = {"ranker": "length", "settings": {"target": 5}, "weight": 1.0, "normalise": "zscore"}
    ranker = rankers.build_ranker("mixture", parts=[part])
    report = evaluated([f"one={folders[0]}", f"two={folders[1]}"], ranker=ranker)
    assert report["beside"] == f"{folders[1].name}, greedy"
    one, two = (report["contestants"][name]["measures"] for name in ("one", "two"))
    # The reference's own greedy answers are as good as themselves.
    equal = ranker.scores([ASKED], [["same", "same"]])[0][0]
    assert (two["reward_greedy"]["mean"], two["reward_greedy"]["stderr"]) == (equal, 0)
    greedy, beside = (
        [a.text for a in answers if a.sample == 0]
        for answers in (read(Path(report["contestants"][n]["answers"][0])) for n in ("one", "two"))
    )
    expected = [
        float(ranker.scores([ASKED], [[a, b]])[0][0]) for a, b in zip(greedy, beside, strict=True)
    ]
    assert one["reward_greedy"]["mean"] == pytest.approx(np.mean(expected))


def test_people_are_not_asked(folders, evaluated, tmp_path):
    with pytest.raises(EvaluationError, match="ranker 'human'"):
        evaluated([f"one={folders[0]}"], ranker=rankers.build_ranker("human"))
    assert not (tmp_path / "out").exists()


class TestAJudge:
    @pytest.fixture
    def rating(self, judge, tmp_path):
        template = tmp_path / "template.txt"
        template.write_text("{prompt}<<>>{response}")
        return rankers.build_ranker(
            "judge", model="scripted", form="pointwise", base_url=judge.url, retries=0,
            template=str(template), cache=str(tmp_path / "cache.sqlite"),
        )  # fmt: skip

    @pytest.fixture
    def prose(self, judge):
        """It talks about what is shown with the first prompt, and rates the rest."""
        judge.says = lambda body: (
            "Quite good." if PROMPTS[0] in body["messages"][-1]["content"] else "Rating: [[7]]"
        )

    def test_prose_is_an_error_and_nothing_is_written(
        self, folders, evaluated, rating, prose, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("selm_jax.policy.policy.Policy.logps", None)  # scores nothing
        with pytest.raises(
            EvaluationError, match="3 of 36 answers so far .*'p0': 'Quite good.'"
        ) as e:
            evaluated([f"one={folders[0]}"], ranker=rating)
        assert f"{tmp_path / 'cache.sqlite'}" in str(e.value) and not (tmp_path / "out").exists()
        assert "--allow-malformed 3, which counts them as no reward" in str(e.value)

    def test_what_is_allowed_is_counted_and_told(
        self, folders, evaluated, rating, prose, judge, tmp_path
    ):
        seen, both = Console(record=True, width=160), [f"one={folders[0]}", f"two={folders[1]}"]
        with pytest.raises(EvaluationError, match="6 of 7. answers so far"):
            evaluated(both, ranker=rating, allow_malformed=5)
        asked = len(judge.bodies)
        report = evaluated(both, ranker=rating, allow_malformed=6, console=seen)
        assert len(judge.bodies) == asked
        assert "6 of 72 answers of the judge could not be read; they count as no reward" in (
            seen.export_text()
        )
        stored = json.loads((tmp_path / "out" / "heldout.json").read_text())
        assert (stored["judge_answers"], stored["malformed"], stored["allow_malformed"]) == (
            72,
            6,
            6,
        )
        assert [stored["contestants"][n]["malformed"] for n in ("one", "two")] == [[3], [3]]
        # Eleven prompts with 7, and one with nothing that could be read.
        reward = report["contestants"]["one"]["measures"]["reward_greedy"]["mean"]
        assert reward == 7
        table = pq.read_table(tmp_path / "out" / "one-0.parquet").to_pylist()
        assert {r["prompt_id"] for r in table if r["score"] is None} == {"p0"}

    def test_a_judge_that_is_never_understood_is_stopped_early(
        self, folders, evaluated, rating, judge
    ):
        judge.says = lambda body: "Quite good."
        with pytest.raises(JudgeError, match=r"20 of the first 20 .*--allow-malformed"):
            evaluated([f"one={folders[0]}"], ranker=rating)
        assert len(judge.bodies) < 36
        seen, both = Console(record=True, width=160), [f"one={folders[0]}", f"two={folders[1]}"]
        report = evaluated(both, ranker=rating, allow_malformed=72, console=seen)
        assert report["contestants"]["one"]["measures"]["reward_greedy"] is None
        assert report["contestants"]["two"]["minus_first"]["reward_sample"] is None
        shown = seen.export_text()
        assert re.search(r"reward, greedy +not readable +not readable", shown)
        assert "72 of 72 answers of the judge could not be read" in shown
