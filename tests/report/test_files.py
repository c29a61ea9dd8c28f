"""Files for a paper: right numbers, and no text of a run that a program would carry out."""

from __future__ import annotations

import base64
import csv
import io
import re

import pytest

from selm_jax.report.curves import loss_plots
from selm_jax.report.data import report_data
from selm_jax.report.files import Table, csv_text, latex_text, link
from selm_jax.report.page import render
from selm_jax.report.run_plots import reward_plots


def cells(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


@pytest.mark.parametrize(
    "text", ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(A1)", " =1", "\t=1"]
)
def test_no_text_becomes_a_formula(text):
    (_, (found,)) = cells(csv_text(["answer"], [[text]]))
    assert found == f"'{text}"
    assert cells(csv_text([text], []))[0] == [f"'{text}"]


def test_numbers_stay_numbers_and_what_is_missing_is_empty():
    rows = [[-0.123456789, 3, None, float("nan"), 'a, "b"\nc']]
    assert cells(csv_text("abcde", rows))[1] == ["-0.123457", "3", "", "", 'a, "b"\nc']


def test_latex_means_nothing_by_what_a_text_holds():
    hostile = r"\input{/etc/passwd} $x_1^2$ 50% & #1 ~ <a> {"
    text = latex_text(["re_ward"], [[hostile], ["[3pt]"], [-1.5], [None]])
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    assert r"\input" not in body and r"\textbackslash{}input\{/etc/passwd\}" in body
    unescaped = re.sub(
        r"\\(textbackslash|textasciicircum|textasciitilde|textless|textgreater)\{\}", "", body
    )
    first = unescaped.strip().splitlines()[0].removesuffix(r" \\")
    assert not re.search(r"(?<!\\)[$%&#_{}^~]", first), first
    assert "{[3pt]}" in body and "$-1.5$" in body and "--" in body
    assert r"re\_ward" in text and text.count(r"\begin{tabular}") == 1


def test_columns_of_numbers_are_aligned_right():
    assert r"\begin{tabular}{lr}" in latex_text(["a", "b"], [["x", 1.0], ["y", None]])


def test_a_link_holds_its_file_and_a_name_that_is_one():
    found = link('../<b>"a b', "csv", b"x,y\n")
    assert base64.b64decode(re.search(r"base64,([^\"]+)", found)[1]) == b"x,y\n"
    assert 'download="b_a_b.csv"' in found and "<b>" not in found


def test_a_table_is_there_in_both_kinds():
    assert re.findall(r'download="([^"]+)"', Table("t", ["a"], [[1]]).links) == ["t.csv", "t.tex"]


def test_every_plot_and_table_of_a_page_has_its_files(run):
    text = render([report_data(run)])
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert all(".pdf" in figure and ".csv" in figure for figure in figures) and len(figures) > 20
    pdfs = re.findall(r"application/pdf;base64,([^\"]+)", text)
    assert all(base64.b64decode(pdf).startswith(b"%PDF-") for pdf in pdfs)
    for table in ("heldout", "dropped", "stages", "versions"):
        assert f'download="quickstart_{table}.csv"' in text
        assert f'download="quickstart_{table}.tex"' in text


def test_the_data_of_a_plot_are_the_metrics(run):
    data = report_data(run)
    (plot, *_) = loss_plots([data], ["mine"])
    header, *rows = cells(plot.drawing.csv)
    raw = [float(row[2]) for row in rows]
    assert header == [
        "line",
        "update, counted through the whole run",
        *("every update", "running mean"),
    ]
    assert raw == pytest.approx([u.metrics["loss"] for u in data.updates], rel=1e-5)
    assert {row[0] for row in rows} == {"mine"}


def test_the_shift_that_keeps_lines_apart_is_not_in_the_data(run):
    data = report_data(run)
    plot = reward_plots([data, data], ["a", "b"])[0]
    assert {row[1] for row in cells(plot.drawing.csv)[1:]} == {"0", "1", "2", "3"}


def test_the_pdf_is_in_real_colours_and_the_same_every_time(run):
    first, again = (loss_plots([report_data(run)], ["a $x$"])[0].drawing.pdf for _ in "ab")
    assert first == again
    assert b"/CreationDate" not in first
