"""A comparison begins with its answer, and says no more than the intervals do."""

from __future__ import annotations

import numpy as np
import pytest

from selm_jax.report import words
from selm_jax.report.answer import of_runs, sentence, with_holm
from selm_jax.report.data import ReportError, report_data
from selm_jax.report.header import facts, is_rehearsal
from selm_jax.report.page import named, render, write
from selm_jax.statistics.intervals import difference
from selm_jax.statistics.multiple import holm

RNG = np.random.default_rng(0)


def gap(mean: float, seeds: int = 2, prompts: int = 40):
    values = RNG.normal(mean, 0.3, (seeds, prompts))
    return difference(values, np.zeros((seeds, prompts)) + RNG.normal(0, 0.3, (seeds, prompts)))


def test_none_differs():
    compared = with_holm([("selm", gap(0.0)), ("mine", gap(0.01))])
    assert not any(each.differs for each in compared)
    text = sentence("dpo", compared, seeds=2)
    assert text.startswith("Neither selm nor mine differs from dpo at 2 seeds (selm ")
    assert "95 % interval" in text and "one seed" not in text


def test_one_differs_and_p_is_after_holms_correction():
    found = [("selm", gap(1.0)), ("mine", gap(0.0)), ("third", gap(0.0)), ("none", None)]
    compared = with_holm(found)
    assert [each.name for each in compared] == ["selm", "mine", "third"]
    p = holm(np.array([each.p for _, each in found if each is not None]))
    assert [each.p_holm for each in compared] == pytest.approx(p.tolist())
    text = sentence("dpo", compared, seeds=1)
    assert text.startswith("selm is better than dpo at 1 seed (+")
    assert "Neither mine nor third differs clearly from dpo" in text
    assert text.endswith(
        "With one seed, this result generalizes to other prompts, but not to other seeds."
    )


def test_a_p_that_is_small_alone_is_not_enough():
    """Eight tests: 0.02 alone is below 0.05, corrected it is not."""
    p, estimates = [0.02] + [0.9] * 7, [gap(0.1) for _ in range(8)]
    found = [
        (f"m{i}", type(e)(**(vars(e) | {"p": each})))
        for i, (e, each) in enumerate(zip(estimates, p, strict=True))
    ]
    assert not any(each.differs for each in with_holm(found))


def test_nothing_to_compare():
    assert "nothing to compare with dpo yet" in sentence("dpo", [], seeds=1)


def test_a_comparison_begins_with_its_answer_under_given_names(make_run, tmp_path):
    runs = [make_run(tmp_path / n, name="same", seed=i) for i, n in enumerate(("a", "b"))]
    out = tmp_path / "out.html"
    write(runs, out, ["dpo", "my <i>selm</i>"])
    text = out.read_text(encoding="utf-8")
    lead = text.index('class="lead verdict"')
    assert lead < text.index('class="summary"')
    assert "my &lt;i&gt;selm&lt;/i&gt; does not differ from dpo at 1 seed" in text[lead:][:400]
    assert "<i>selm" not in text
    with pytest.raises(ReportError, match="two runs are called 'dpo'"):
        write(runs, out, ["dpo", "dpo"])


def test_runs_of_two_rankers_get_no_verdict(make_run, tmp_path):
    runs = [
        report_data(make_run(tmp_path / n, settings=f"feedback:\n  ranker: {n}\n")) for n in "ab"
    ]
    assert "scored by 2 different rankers" in of_runs(runs, ["a", "b"])


def test_a_name_is_what_stands_before_the_equals_sign(tmp_path):
    assert named("dpo=runs/a")[0] == "dpo" and str(named("dpo=runs/a")[1]) == "runs/a"
    assert named("runs/a") == (None, named("runs/a")[1])
    odd = tmp_path / "x=y"
    odd.mkdir()
    assert named(str(odd)) == (None, odd)  # a folder whose name holds one


def test_dropped_prompts_stand_side_by_side(make_run, tmp_path):
    runs = [
        report_data(make_run(tmp_path / n, name=n, prompts=p)) for n, p in (("a", 12), ("b", 8))
    ]
    text = render(runs)
    table = text[text.index("Dropped prompts of all runs") :].partition("</table>")[0]
    assert "<bdi>a</bdi>" in table and "<bdi>b</bdi>" in table
    kept = table[table.index("kept as pairs") :].partition("</tr>")[0]
    assert "216" in kept and "144" in kept  # 6 of each prompt in 3 iterations


SETTINGS = """model: {source: org/model}
data: {train: org/data, heldout: held.jsonl, limit: 100}
feedback: {ranker: sentiment, settings: {threshold: 2}}
"""


def test_the_header_says_what_was_run(make_run, tmp_path):
    run = report_data(make_run(tmp_path / "r", iterations=0, settings=SETTINGS))
    found = dict(facts(run.settings, run.manifest))
    assert found["Model"].startswith("org/model") and "134,515,008 parameters" in found["Model"]
    assert found["Objective"] == "selm (alpha 0.001, beta 0.01)"
    assert found["Ranker"] == "sentiment (threshold 2)"
    assert found["Training data"] == "org/data, first 100 rows"
    assert found["Seed"] == "0" and "jax 0.10.2" in found["Versions"]
    text = render([run])
    assert all(f"<dt>{title}</dt>" in text for title in found)
    assert 'class="rehearsal"' not in text


def test_a_rehearsal_is_marked(make_run, tmp_path):
    settings = "model: {source: runs/mine-tiny/inputs/model}\n"
    run = report_data(make_run(tmp_path / "r", iterations=0, settings=settings))
    assert is_rehearsal(run.settings) and 'class="rehearsal"' in render([run])
    assert not is_rehearsal({"model.source": "inputs/model"}) and not is_rehearsal({})


def test_words_that_became_more_frequent():
    before, after = ["the plain old river " * 20] * 5, ["the great new river " * 20] * 5
    found = words.changes("x", before, after)
    assert {each.word for each in found.more} == {"great", "new"}
    assert {each.word for each in found.less} == {"plain", "old"}
    assert found.more[0].after == pytest.approx(250) and found.more[0].before == 0
    same = words.changes("x", before, before)
    assert not same.more and not same.less
    assert not words.changes("x", [], after).more
