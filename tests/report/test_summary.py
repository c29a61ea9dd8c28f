"""The numbers in words, and the measures of texts, against slow or known answers."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selm_jax.report.curves import running_mean
from selm_jax.report.data import report_data
from selm_jax.report.summary import (
    alarms,
    number,
    paired_difference,
    paragraph,
    percent,
    progress,
    settings_differences,
)
from selm_jax.report.texts import measure
from selm_jax.text.variety import distinct, words


def test_paragraph_of_a_clear_rise(run):
    assert paragraph(report_data(run)).replace("\u00a0", " ") == (
        "Held-out reward rose from 0.30 to 0.60 (paired difference +0.30, 95 % interval "
        "0.22 to 0.39, 12 prompts), at a KL of 12 nats per answer from the start, "
        "after 3 iterations."
    )


def test_paragraph_claims_nothing_when_the_interval_holds_zero(make_run, tmp_path):
    data = report_data(make_run(tmp_path / "r", gain=0.01))
    assert paragraph(data).startswith("Held-out reward did not change clearly: from 0.30 to 0.33")


def test_paragraph_of_a_fall_names_the_best(make_run, tmp_path):
    text = paragraph(report_data(make_run(tmp_path / "r", gain=-0.1)))
    assert text.startswith("Held-out reward fell from 0.30 to 0 (")
    assert "paired difference −0.30" in text
    assert text.endswith("The highest reward, 0.30, belongs to the start model.")


def test_paragraph_before_anything_is_trained(make_run, tmp_path):
    data = report_data(make_run(tmp_path / "r", iterations=0))
    assert paragraph(data).startswith("Held-out reward of the start model: 0.30. No trained")
    none = dataclasses.replace(data, evaluations={})
    assert paragraph(none).startswith("No held-out evaluation is finished yet")


def test_progress(make_run, tmp_path, run):
    assert progress(report_data(run)) == "finished, 3 iterations"
    part = make_run(tmp_path / "u", iterations=2, last_stages=("generate",))
    assert progress(report_data(part)) == "unfinished, 1 of 3 iterations complete"


def test_alarms_ring_on_collapse_only(make_run, tmp_path, run):
    assert alarms(report_data(run)) == []
    collapsed = " ".join(alarms(report_data(make_run(tmp_path / "c", repeat=True))))
    for sign in ("distinct-2 fell", "same answer", "length limit", "length changed"):
        assert sign in collapsed


def test_paired_difference_is_the_paired_t_interval(make_run, tmp_path, run):
    one, other = report_data(run), report_data(make_run(tmp_path / "o", seed=5, gain=0.2))
    found = paired_difference(one, other)

    def last(data):
        return {
            a.prompt_id: a.score for a in data.answers if (a.iteration, a.kind) == (3, "greedy")
        }

    a, b = last(one), last(other)
    oracle = stats.ttest_rel([b[k] for k in a], [a[k] for k in a])
    interval = oracle.confidence_interval(0.95)
    assert found is not None and found.prompts == 12
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert paired_difference(one, one).mean == 0

    def scored(data, score):
        return dataclasses.replace(
            data, answers=[dataclasses.replace(a, score=score) for a in data.answers]
        )

    right = paired_difference(scored(one, 0.0), scored(other, 1.0))  # 12 of 12 is no certainty
    assert right is not None and right.mean == 1 == right.high and 0.4 < right.low < 0.6
    assert paired_difference(one, dataclasses.replace(other, answers=())) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.2867, "0.29"),
        (12.04, "12"),
        (12.34, "12.3"),
        (9.999, "10"),
        (0.0949, "0.095"),
        (0.02, "0.02"),
        (-0.00123, "−0.0012"),
        (0, "0"),
        (0.3 - 0.1 - 0.1 - 0.1, "0"),
        (2.5e-5, "2.5e−5"),
        (1234.5, "1,234"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@given(st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-9))
def test_number_reads_back(value):
    back = float(number(value, sign=True).replace("−", "-").replace(",", ""))
    assert back == pytest.approx(value, rel=0.06)


def test_percent():
    assert [percent(x) for x in (0, 0.004, 0.5, 1)] == [
        "0\u00a0%",
        "0.4\u00a0%",
        "50\u00a0%",
        "100\u00a0%",
    ]


def test_settings_differences():
    tables = [{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}]
    assert settings_differences(tables) == [("b", ["2", "3"]), ("c", [None, "4"])]
    assert settings_differences(tables[:1]) == []


def test_words_and_distinct():
    assert words("It's 2 o'clock.\n雨が") == [
        "it", "'", "s", "2", "o", "'", "clock", ".", "雨", "が",
    ]  # fmt: skip
    assert distinct(["a b c"], 2) == 1
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "A B"], 2) == 0.5  # across answers, case aside
    assert distinct(["one", ""], 2) == 0


def test_measure(run):
    answers = [a for a in report_data(run).answers if a.kind == "greedy"][:2]
    one = dataclasses.replace(answers[0], text="Yes, yes!", finish="length")
    two = dataclasses.replace(answers[1], text=" Yes, yes! ", finish="stop")
    found = measure([one, two])
    assert (found.words, found.different, found.cut_off) == (2, 0.5, 0.5)
    with pytest.raises(ValueError, match="no answers"):
        measure([])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 9))
def test_running_mean_keeps_ends_and_range(values, width):
    means = running_mean(values, width)
    assert len(means) == len(values)
    assert means[0] == values[0] and means[-1] == values[-1]
    assert all(min(values) - 1e-9 <= mean <= max(values) + 1e-9 for mean in means)


@given(st.integers(2, 30), st.integers(1, 9))
def test_running_mean_leaves_a_straight_line_alone(length, width):
    line = [0.5 * i for i in range(length)]
    assert running_mean(line, width) == pytest.approx(line)


def test_running_mean_over_gaps():
    assert running_mean([1.0, math.nan, 3.0], 3)[1] == 2
    assert math.isnan(running_mean([math.nan], 3)[0])
