"""The capability guard's tasks: scores, standard errors, changes, and when a score fell."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from selm_jax.evaluation import EvaluationError, task_scores
from selm_jax.tables.task_scores import Row


def rows(values, measure="acc", higher=True, task="river"):
    return [Row(task, measure, i, f"asked {i}", v, higher) for i, v in enumerate(values)]


def test_a_score_is_a_mean_and_its_change_is_paired_by_question():
    rng = np.random.default_rng(0)
    before = rng.normal(size=30)
    after = before + rng.normal(0.5, 0.1, 30)
    found = task_scores.summarize(rows(after), rows(before))
    assert found["tasks/river/acc"] == pytest.approx(after.mean())
    assert found["tasks/river/acc_stderr"] == pytest.approx(stats.sem(after))
    gap = after - before
    low, high = stats.t.interval(0.95, 29, gap.mean(), stats.sem(gap))
    assert found["tasks/river/acc_change"] == pytest.approx(gap.mean())
    assert found["tasks/river/acc_change_low"] == pytest.approx(low)
    assert found["tasks/river/acc_change_high"] == pytest.approx(high)
    assert found["tasks/fallen"] == 0
    # The unpaired interval of the same scores would be many times as wide.
    assert high - low < found["tasks/river/acc_high"] - found["tasks/river/acc_low"]


@pytest.mark.parametrize(
    ("shift", "higher", "falls"),
    [(-0.5, True, True), (0.5, True, False), (0.5, False, True), (-0.5, False, False),
     (-0.01, True, False), (-0.5, None, False)],
)  # fmt: skip
def test_a_score_fell_if_its_interval_is_on_the_wrong_side_of_the_start(shift, higher, falls):
    rng = np.random.default_rng(1)
    before = rng.normal(size=40)
    mine = rows(before + shift + rng.normal(0, 0.2, 40), higher=higher)
    found = task_scores.summarize(mine, rows(before, higher=higher))
    assert task_scores.fallen(mine, found) == (["tasks/river/acc"] if falls else [])
    assert found["tasks/fallen"] == falls
    last = list(task_scores.lines(mine, found))[-1]
    assert last.startswith("capability guard: tasks/river/acc: worse than") == falls


def test_a_perplexity_that_an_earlier_version_measured_as_one_number_is_not_compared():
    rng = np.random.default_rng(2)
    mine = rows(rng.gamma(9, size=12), measure="word_perplexity", higher=False)
    start = [dataclasses.replace(mine[0], question=None, value=9.0)]
    found = task_scores.summarize(mine, start)
    assert "tasks/river/word_perplexity" in found and found["tasks/fallen"] == 0
    assert "tasks/river/word_perplexity_change" not in found


def test_right_and_wrong_answers_have_the_interval_of_shares():
    right = rows([1.0] * 20)
    found = task_scores.summarize(right, rows([1.0] * 20))
    assert found["tasks/river/acc_low"] < 1 == found["tasks/river/acc_high"]
    assert found["tasks/river/acc_change"] == 0 > found["tasks/river/acc_change_low"]
    assert task_scores.summarize(right, None).keys() == {
        f"tasks/river/acc{end}" for end in ("", "_low", "_high", "_stderr")
    }


def test_a_measure_of_a_whole_task_is_one_number_that_is_not_compared():
    def whole(value):
        return [Row("book", "bleu", None, "", value, True)]

    both = [*whole(90.0), *rows([1.0, 0.0], task="other")]
    found = task_scores.summarize(both, [*whole(20.0), *rows([0.0, 1.0], task="other")])
    assert {key for key in found if "book" in key} == {"tasks/book/bleu"}
    assert next(iter(task_scores.lines(both, found))) == "book, bleu: 90"


def group(values, shares, stderr=0.5):
    """The rows of a group: its aggregate, then the questions of its members."""
    total = sum(share * np.mean(v) for share, v in zip(shares, values, strict=True))
    first = Row("land", "acc", None, "", total, True, "land", stderr=stderr)
    members = (
        dataclasses.replace(row, group="land", share=share)
        for name, share, mine in zip(("river", "hill"), shares, values, strict=True)
        for row in rows(mine, task=name)
    )
    # lm-eval aggregates no acc_norm of this group, so it is kept but has no number.
    other = (dataclasses.replace(row, group="land") for row in rows([1.0, 0.0], "acc_norm"))
    return [first, *members, *other]


def test_a_group_is_one_number_whose_change_is_paired_and_stratified():
    rng = np.random.default_rng(2)
    sizes, shares = (12, 30), (0.7, 0.3)
    before = [rng.normal(3 * k, 1, n) for k, n in enumerate(sizes)]
    after = [v + rng.normal(-0.3, 0.4, len(v)) for v in before]
    mine = group(after, shares)
    found = task_scores.summarize(mine, group(before, shares))
    assert {key.split("_")[0] for key in found} == {"tasks/land/acc", "tasks/fallen"}
    assert (found["tasks/land/acc"], found["tasks/land/acc_stderr"]) == (mine[0].value, 0.5)
    gaps = [a - b for a, b in zip(after, before, strict=True)]
    change = sum(share * gap.mean() for share, gap in zip(shares, gaps, strict=True))
    scaled = [share * gap for share, gap in zip(shares, gaps, strict=True)]
    welch = stats.ttest_ind(scaled[0], -scaled[1], equal_var=False)
    low, high = welch.confidence_interval()
    assert found["tasks/land/acc_change"] == pytest.approx(change)
    assert found["tasks/land/acc_change_low"] == pytest.approx(low)
    assert found["tasks/land/acc_change_high"] == pytest.approx(high) and high < 0
    *scores, warning = task_scores.lines(mine, found)
    assert len(scores) == 1 and scores[0].startswith("land, acc: ")
    assert "guard: tasks/land/acc: worse" in warning and task_scores.fallen(mine, found)


def test_a_group_that_lost_everything_is_noticed_and_one_of_single_questions_has_no_interval():
    right, wrong = ([[v] * 5, [v] * 5] for v in (1.0, 0.0))
    mine = group(wrong, (0.5, 0.5))
    found = task_scores.summarize(mine, group(right, (0.5, 0.5)))
    assert found["tasks/land/acc_change_high"] < 0 and found["tasks/fallen"] == 1
    alone = group([[1.0], [0.0]], (0.5, 0.5), stderr=None)
    found = task_scores.summarize(alone, alone)
    assert found == {"tasks/land/acc": 0.5, "tasks/fallen": 0}
    (line,) = task_scores.lines(alone, found)
    assert line == "land, acc: 0.5, no interval, because river has one question only"


@pytest.mark.parametrize(
    "change",
    [
        lambda before: before[:-1],
        lambda before: [dataclasses.replace(before[0], prompt="asked otherwise"), *before[1:]],
        lambda before: [dataclasses.replace(row, measure="acc_norm") for row in before],
    ],
)
def test_other_questions_than_the_start_models_are_an_error(change):
    before = rows([0.0, 1.0, 1.0])
    with pytest.raises(EvaluationError, match=r"task river.*selm redo RUN evaluate -t 0"):
        task_scores.summarize(before, change(before))
