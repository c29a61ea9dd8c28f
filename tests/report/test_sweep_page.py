"""The page of a sweep begins with its answer, and says what was run."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from selm_jax.report import sweep_page
from selm_jax.report.header import shared_facts
from selm_jax.report.sweep_page import Row
from selm_jax.statistics.intervals import Estimate, difference

RNG = np.random.default_rng(3)


def row(level: str, gap: float | None, folder: str, p_holm: float | None = None) -> Row:
    score = Estimate(0.5, 0.01, 0.48, 0.52)
    values = RNG.normal(gap or 0, 0.1, (2, 20))
    found = None if gap is None else difference(values, np.zeros((2, 20)))
    return Row(
        levels=(level,), changes=(f"objective.loss={level}",),
        runs=((1, f"{folder}1", True), (2, f"{folder}2", True)), baseline=gap is None,
        ranked=100.0, updates=8.0, greedy=score, gain=score, sample=score, kl=score, tokens=40.0,
        cut_off=0.0, difference=found, difference_sample=found, difference_by_seed={1: 0.1},
        by_iteration={0: score, 1: score}, kl_by_iteration={0: score, 1: score}, p_holm=p_holm,
    )  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Writes a sweep's page over runs with these settings; its text."""

    def write(rows, settings: str = "") -> str:
        for one in rows:
            for seed, folder, _ in one.runs:
                (tmp_path / folder).mkdir(exist_ok=True)
                (tmp_path / folder / "config.yaml").write_text(
                    f"output: {tmp_path / folder}\nseed: {seed}\niterations: 3\n"
                    f"objective: {{loss: '{one.name}', beta: 0.1}}\n{settings}"
                )
                machine = {"versions": {"jax": "0.10.2"}, "commit": f"of seed {seed}"}
                (tmp_path / folder / "manifest.json").write_text(json.dumps(machine))
        sweep_page.write(
            tmp_path / "report.html", rows, title="My sweep", about="Does it help?",
            command="selm sweep x.yaml", axes=["method"], axis="method", against="dpo", failed={},
            shared={"rank": (1, 2)},
        )  # fmt: skip
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def lists(text: str) -> list[dict[str, str]]:
    """The lists of facts in the header."""
    found = re.findall(r'<dl class="about">(.*?)</dl>', text, re.DOTALL)
    return [dict(re.findall(r"<dt>(.*?)</dt><dd><bdi>(.*?)</bdi>", each)) for each in found]


def test_the_header_says_what_is_common_to_all_runs_and_what_varies(written):
    rows = [row("dpo", None, "base"), row("selm", 0.0, "s", 0.6)]
    same, varied = lists(written(rows, "data: {train: my.jsonl}\n"))
    assert same == {"Training data": "my.jsonl", "Iterations": "3", "Versions": "jax 0.10.2"}
    assert varied == {
        "seed": "1 | 2", "objective.loss": "dpo | selm", "Commit": "of seed 1 | of seed 2"
    }  # fmt: skip


def test_equal_files_in_the_runs_own_folders_do_not_vary():
    runs = [
        ({"output": f"runs/{name}", "model.source": f"runs/{name}/inputs/model"}, {})
        for name in ("a", "b")
    ]
    assert shared_facts(runs) == ([("Model", "RUN/inputs/model")], [])


def test_of_many_values_the_header_shows_some():
    runs = [({"output": f"runs/{i}", "seed": str(i)}, {}) for i in range(9)]
    assert shared_facts(runs)[1] == [("seed", "0 | 1 | 2 | 3 | 4 | 5 | and 3 more")]
    assert shared_facts([]) == ([], [])


def test_none_differs(written):
    rows = [row("dpo", None, "base"), row("selm", 0.0, "s", 0.6), row("mine", 0.0, "m", 0.6)]
    text = written(rows)
    lead = text.index('class="lead verdict"')
    assert "Neither selm nor mine differs from dpo at 2 seeds (" in text[lead:][:300]
    assert lead < text.index('class="summary"')


def test_the_corrected_p_decides(written):
    """The interval is clear of 0, yet p after the correction is not below 0.05."""
    rows = [row("dpo", None, "base"), row("selm", 1.0, "s", 0.2), row("mine", 1.0, "m", 0.001)]
    text = written(rows)
    assert "mine is better than dpo at 2 seeds (" in text
    assert "Selm does not differ clearly" not in text  # a name stays as it is
    assert "elm does not differ clearly from dpo" in text


def test_facts_files_and_a_rehearsal(written):
    rows = [row("dpo", None, "base"), row("=selm", 0.0, "s", 1.0)]
    text = written(rows, "model: {source: runs/x-tiny/inputs/model}\n")
    assert 'class="rehearsal"' in text
    assert 'download="comparison.csv"' in text and 'download="comparison.tex"' in text
    assert text.count("application/pdf;base64") == 3
    table = sweep_page._numbers("t", "method", [(r.levels[0], r) for r in rows])
    assert len({len(line) for line in (table.columns, *table.rows)}) == 1
    at = table.columns.index("difference")
    assert table.rows[0][at] is None and math.isfinite(table.rows[1][at])
