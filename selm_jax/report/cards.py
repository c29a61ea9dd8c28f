"""Collects the texts that a report shows: held-out answers side by side, and training pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from selm_jax.report.data import Answer, ReportError, RunData
from selm_jax.report.plots import run_style, swatch
from selm_jax.report.reading import check_digest
from selm_jax.shell import artifacts
from selm_jax.tables import ranked

MAX_PROMPTS = 256
"""Maximum number of held-out prompts on the page; numbers and plots always use all prompts."""
MAX_PAIRS = 240
"""Maximum number of training prompts on the page, over all runs and iterations."""
_OF_EACH_REASON = 5  # number of dropped prompts to show for each reason, if there are that many


def answer_cards(
    runs: Sequence[RunData], labels: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """Makes a card, a box on the page, for each held-out prompt with its answers.

    A prompt is identified by its id and its text, so runs that use one id for different texts get
    different cards.

    Returns:
      The cards, and the number of prompts beyond `MAX_PROMPTS`, which get no card.
    """
    cards: dict[tuple[str, str], list[tuple[int, Answer]]] = {}
    for index, run in enumerate(runs):
        for answer in run.answers:
            cards.setdefault((answer.prompt_id, answer.prompt), []).append((index, answer))
    shown = [
        {
            "id": prompt_id,
            "prompt": prompt,
            "gain": _gain([a for i, a in answers if i == 0 and a.kind == "greedy"]),
            "groups": list(_rows_of_answers(runs, labels, answers)),
        }
        for (prompt_id, prompt), answers in list(cards.items())[:MAX_PROMPTS]
    ]
    return shown, max(0, len(cards) - MAX_PROMPTS)


def _rows_of_answers(
    runs: Sequence[RunData], labels: Sequence[str], answers: Sequence[tuple[int, Answer]]
) -> Iterator[dict[str, Any]]:
    """Yields rows of answers to one prompt, which the page shows side by side.

    For one run, a row contains all iterations. For several runs, a row contains the runs' answers
    after the same iteration, and the last iteration comes first.
    """
    several = len(runs) > 1
    views: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for index, answer in answers:
        own = [a for i, a in answers if i == index and a.kind == answer.kind]
        view = _answer_view(runs[index], answer, own)
        if several:
            view |= {"label": labels[index], "swatch": swatch(run_style(index))}
        row = (answer.kind, -answer.iteration if several else 0)
        views.setdefault(row, []).append(view | {"run": index})
    for (kind, t), row in sorted(views.items()):
        yield {"kind": f"{kind}, iteration {-t}" if several else kind, "answers": row}


def _answer_view(run: RunData, answer: Answer, group: Sequence[Answer]) -> dict[str, Any]:
    start = [other.score for other in group if other.iteration == 0]
    only = len(start) == 1 and answer.iteration > 0
    return {
        "label": "",
        "swatch": "",
        "kind": answer.kind,
        "iteration": answer.iteration,
        "text": answer.text,
        "cut_off": answer.finish == "length",
        "finish": answer.finish,
        "score": answer.score,
        "unread": math.isnan(answer.score) and bool(run.metric(answer.iteration, "unread")),
        "change": answer.score - start[0] if only else None,
    }


def _gain(greedy: Sequence[Answer]) -> float:
    """The score of the last greedy answer minus the start model's; 0 if either is missing."""
    scores = {a.iteration: a.score for a in greedy if math.isfinite(a.score)}
    return scores[max(scores)] - scores[0] if 0 in scores else 0.0


@dataclass(frozen=True)
class PairCard:
    """One training prompt with its candidates, best first, and whether they gave a pair.

    Attributes:
      outcome: "kept", or the reason why there is no pair for the prompt, in words.
      margin: score of the chosen answer minus that of the rejected one; 0 if there is no pair.
    """

    run: int
    label: str
    iteration: int
    id: str
    prompt: str
    outcome: str
    margin: float
    candidates: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Pairs:
    """The training prompts of all runs as cards; `left_out` counts those beyond `MAX_PAIRS`."""

    cards: tuple[PairCard, ...]
    left_out: int

    @property
    def outcomes(self) -> list[str]:
        return sorted(
            {card.outcome for card in self.cards}, key=lambda each: (each != "kept", each)
        )

    @property
    def iterations(self) -> list[int]:
        return sorted({card.iteration for card in self.cards})

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(card.label for card in self.cards if card.label))


def pairs(runs: Sequence[RunData], labels: Sequence[str]) -> Pairs:
    """Reads training prompts from every iteration's ranked.parquet, up to a limit per page.

    Each iteration gets the same share of the page: its first prompts, and some for every reason
    why prompts were dropped.
    """
    several = len(runs) > 1
    groups = [
        (index, k, stages["rank"].outputs.get("ranked.parquet"))
        for index, run in enumerate(runs)
        for k, stages in run.stages.items()
        if "rank" in stages and (run.path / f"iteration_{k}" / "ranked.parquet").is_file()
    ]
    room = MAX_PAIRS // max(len(groups), 1)
    shown: list[PairCard] = []
    left_out = 0
    for index, k, digest in groups:
        label = labels[index] if several else ""
        found = list(_pair_cards(runs[index], index, k, label, digest))
        kept = _some(found, room)
        shown += kept
        left_out += len(found) - len(kept)
    return Pairs(tuple(shown), left_out)


def _some(cards: Sequence[PairCard], room: int) -> list[PairCard]:
    """Selects the first `room` cards and a few of each outcome, in their original order."""
    first = set(range(min(room, len(cards))))
    for outcome in {card.outcome for card in cards}:
        first |= set(
            [i for i, card in enumerate(cards) if card.outcome == outcome][:_OF_EACH_REASON]
        )
    return [cards[i] for i in sorted(first)]


def _pair_cards(
    run: RunData, index: int, k: int, label: str, digest: str | None
) -> Iterator[PairCard]:
    path = run.path / f"iteration_{k}" / "ranked.parquet"
    check_digest(path, digest)
    try:
        rows = ranked.read(path, token_ids=False)
    except artifacts.ArtifactError as error:
        raise ReportError(str(error)) from error
    for prompt_id, of_prompt in groupby(rows, lambda row: row.prompt_id):
        candidates = list(of_prompt)
        scores = {
            role: row.score
            for row in candidates
            for role in ("chosen", "rejected")
            if getattr(row, role)
        }
        margin = scores.get("chosen", math.nan) - scores.get("rejected", math.nan)
        dropped = candidates[0].dropped
        yield PairCard(
            run=index, label=label, iteration=k, id=prompt_id, prompt=candidates[0].prompt,
            outcome="kept" if dropped is None else dropped.replace("_", " "),
            margin=margin if math.isfinite(margin) else 0.0,
            candidates=tuple(map(_candidate_view, sorted(candidates, key=_best_first))),
        )  # fmt: skip


def _best_first(row: ranked.Row) -> tuple[float, int]:
    return (math.inf if math.isnan(row.score) else -row.score, row.candidate)


def _candidate_view(row: ranked.Row) -> dict[str, Any]:
    return {
        "roles": [role for role in ("chosen", "rejected", "explore") if getattr(row, role)],
        "source": f"sample {row.sample}" if row.source == "sample" else row.source,
        "score": row.score,
        "cut_off": row.finish == "length",
        "text": row.text,
    }
