"""The browser of training pairs: a prompt's candidates, their roles, and why it was dropped."""

from __future__ import annotations

import html
import math

import pytest

from selm_jax.report import cards
from selm_jax.report.cards import pairs
from selm_jax.report.data import ReportError, report_data
from selm_jax.report.page import render
from selm_jax.tables import ranked

HOSTILE = "<script>alert(1)</script>"


def rows(prompt: int, dropped: str | None = None, text: str = "fine") -> list[ranked.Row]:
    return [
        ranked.Row(
            prompt_id=f"t{prompt}", prompt=f"Question {prompt}?", candidate=i,
            source="sample" if i else "greedy", sample=i, token_ids=(1, 2),
            text=f"{text} {prompt} {i}", finish="length" if i == 2 else "stop",
            score=[0.2, 0.9, math.nan][i], rank=i, chosen=i == 1 and dropped is None,
            rejected=i == 0 and dropped is None, explore=i == 0 and dropped is None,
            dropped=dropped,
        )
        for i in range(3)
    ]  # fmt: skip


@pytest.fixture
def with_pairs(run):
    """Ten prompts in each iteration: the last is dropped for a tie."""
    for k in (1, 2, 3):
        table = [row for i in range(9) for row in rows(i)] + rows(9, "equal_text", HOSTILE)
        ranked.write(run / f"iteration_{k}" / "ranked.parquet", table)
    return run


def test_a_card_shows_all_candidates_the_best_first_with_roles_and_scores(with_pairs):
    found = pairs([report_data(with_pairs)], ["run"])
    assert len(found.cards) == 30 and found.left_out == 0
    first = found.cards[0]
    assert (first.iteration, first.id, first.outcome) == (1, "t0", "kept")
    assert first.margin == pytest.approx(0.7)
    assert [c["roles"] for c in first.candidates] == [["chosen"], ["rejected", "explore"], []]
    assert [c["source"] for c in first.candidates] == ["sample 1", "greedy", "sample 2"]
    assert first.candidates[2]["cut_off"] and math.isnan(first.candidates[2]["score"])
    assert found.outcomes == ["kept", "equal text"] and found.iterations == [1, 2, 3]


def test_where_room_is_short_every_reason_is_still_shown_and_the_rest_counted(
    with_pairs, monkeypatch
):
    monkeypatch.setattr(cards, "MAX_PAIRS", 6)
    monkeypatch.setattr(cards, "_OF_EACH_REASON", 1)
    found = pairs([report_data(with_pairs)], ["run"])
    assert [(c.iteration, c.id) for c in found.cards[:3]] == [(1, "t0"), (1, "t1"), (1, "t9")]
    assert found.left_out == 30 - 9


def test_the_page_escapes_them_and_offers_filters(with_pairs):
    text = render([report_data(with_pairs)])
    assert HOSTILE not in text and html.escape(HOSTILE) in text
    assert text.count('class="card pair"') == 30
    assert 'data-key="outcome"' in text and '<option value="equal text">' in text
    assert 'data-key="run"' not in text  # there is one run


def test_runs_without_ranked_candidates_say_so(run):
    assert "No ranked candidates are in the run folder yet." in render([report_data(run)])


def test_a_damaged_table_is_named(with_pairs):
    (with_pairs / "iteration_2" / "ranked.parquet").write_text("not parquet")
    with pytest.raises(ReportError, match=r"ranked.parquet: this table is damaged"):
        render([report_data(with_pairs)])
