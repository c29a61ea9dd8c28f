"""The page of an experiment: the answer first, then how it was made, figures, and all numbers."""

import base64
import csv
import io
import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from selm_jax.lab import command, experiments, page, stats
from selm_jax.shell.commit import versions

ROUNDS = [1, 2, 4]


def compared(gap, seed):
    """A comparison over 16 worlds with a true gap."""
    base = np.random.default_rng(seed).normal(3, 0.2, 16)
    return stats.compare(base + np.random.default_rng(99).normal(gap, 0.1, 16), base)


def regret_records():
    curve = {"rounds": ROUNDS, "mean": [1.0, 2.0, 3.0]}
    curve |= {"low": [0.9, 1.9, 2.9], "high": [1.1, 2.1, 3.1]}
    curve |= {"slope": 0.5, "slope_low": 0.4, "slope_high": 0.6}
    against = stats.correct([{"of": "dpo_online"} | compared(-1.0, 0)])[0]
    return [
        {"algorithm": "dpo_online", "landscape": "needle"} | curve,
        {"algorithm": "selm_fixed", "landscape": "needle"} | curve | {"against": against},
        {"algorithm": "selm_moving", "landscape": "needle"} | curve,
    ]


def map_records():
    return [
        {"dimension": 4, "landscape": "needle", "coverage": 0.1, "temperature": t, "alpha": a,
         "against": against} | compared(-a, i)
        for i, (t, a, against) in enumerate(
            (t, a, against)
            for t in (0.1, 1.0) for a in (-0.3, 1.0) for against in ("online", "passive")
        )
    ]  # fmt: skip


def made(monkeypatch, folder, name, result, *arguments):
    monkeypatch.setattr(experiments, name, lambda *_, **__: result)
    told = CliRunner().invoke(
        command.app, [*arguments, "--seeds", "16", "--out", str(folder)], catch_exceptions=False
    )
    assert told.exit_code == 0
    file = re.search(r"page: (\S+)", told.output.replace("\n", ""))[1]
    return open(file, encoding="utf-8").read()


def saved(text, kind):
    """The files of one kind on a page, by name."""
    links = re.findall(rf'download="([^"]+\.{kind})" href="data:[^,]*,([^"]*)"', text)
    return {name: base64.b64decode(data) for name, data in links}


def test_it_begins_with_the_answer_and_says_how_it_was_made(monkeypatch, tmp_path):
    text = made(monkeypatch, tmp_path, "regret_curves", regret_records(), "regret")
    lead = text.index('class="lead verdict"')
    assert "1 comparison with dpo_online, each over 16 worlds: 1 with clearly less" in text[lead:]
    assert lead < text.index('<dl class="about">') < text.index("<figure>") < text.index("<table>")
    facts = dict(re.findall(r"<dt>(\w+)</dt><dd><bdi>([^<]*)", text))
    assert facts["Command"] == "selm lab regret --seeds 16 --seed 0"
    assert "16 per setting; seed 0" == facts["Worlds"] and "8 prompts" in facts["Sizes"]
    assert f"jax {versions()['jax']}" in facts["Versions"] and facts["Made"].endswith("UTC")


def test_figures_and_tables_can_be_saved(monkeypatch, tmp_path):
    text = made(monkeypatch, tmp_path, "regret_curves", regret_records(), "regret")
    (pdf,) = saved(text, "pdf").values()
    assert pdf == (tmp_path / "lab_regret.pdf").read_bytes() and pdf.startswith(b"%PDF-")
    tables = saved(text, "csv")
    assert {"lab_regret.csv", "lab_regret_slopes.csv"} < set(tables)
    assert set(saved(text, "tex")) == {"lab_regret.tex", "lab_regret_slopes.tex"}
    (row,) = csv.DictReader(io.StringIO(tables["lab_regret.csv"].decode()))
    wrote = json.loads((tmp_path / "lab_regret.json").read_text())[1]["against"]
    assert float(row["Difference of regret low"]) == pytest.approx(wrote["low"], rel=1e-5)
    assert '<svg style="width: 3.1in" class="plot"' in text and "var(--c1)" in text


def test_a_map_has_both_baselines(monkeypatch, tmp_path):
    records = map_records()
    text = made(monkeypatch, tmp_path, "optimism_map", [records], "map", "--landscape", "needle")
    assert text.count("<figure>") == 2 and "online DPO or passive DPO" in text
    assert "SELM, alpha −0.3, compared with online DPO: more regret in" in text
    (tmp_path / "lab_map_needle_passive.pdf").read_bytes()


def test_a_name_cannot_become_markup(tmp_path):
    record = compared(0.0, 0) | {"p_holm": 1.0}
    name = "<script>alert(1)</script>"
    world = page.base_case()
    page.write(
        tmp_path / "x.html", name, page.Made("idea", 16, 0, "x", world),
        [page.finding(record, name, "DPO", name, 16)],
    )  # fmt: skip
    assert name not in (tmp_path / "x.html").read_text(encoding="utf-8")
