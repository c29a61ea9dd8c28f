"""From scores to preference pairs: pure functions, and the report of what became of each prompt.

The order of the candidates matters where scores tie; the authors' order is the model's own
response first, then the dataset's chosen, then its rejected (online_feedback.py in the code
published with arXiv 2405.19332).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from jaxtyping import Int, Real

from selm_jax.feedback.ranker import FeedbackError
from selm_jax.words import did_you_mean

SOURCES = ("greedy", "sample", "chosen", "rejected")
FINISHES = ("stop", "length", "dataset")
RULES = ("best_worst", "swap", "top_random")
EXPLORES = ("greedy", "sample", "all", "random", "best", "worst")
TIES = ("drop", "first")
CUT_OFFS = ("keep", "drop")
REASONS = (
    *("not_asked", "not_answered", "unusable_answer"),
    *("malformed", "tie", "equal_text", "empty", "cut_off", "margin"),
)
PLACES = ("best", "middle", "worst", "tied")
ROLES = ("chosen", "rejected", "explore")

Scores: TypeAlias = Sequence[float] | Real[np.ndarray, " candidates"]


def check_choice(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise FeedbackError(
            f"{name} is {value!r}{did_you_mean(str(value), expected)} "
            f"Expected one of {', '.join(expected)}."
        )


@dataclass(frozen=True)
class Candidate:
    """One response to one prompt.

    Attributes:
        source: `greedy` and `sample` are the model's own; `chosen` and `rejected` the dataset's.
        text: the response as people and rankers read it.
        token_ids: the ids that are trained on, an end token included; None for text that is not
            tokenised yet.
        finish: `stop` ended by itself, `length` was cut off, `dataset` was not generated here.
        sample: the number of the sample within its prompt.

    Raises:
        FeedbackError: unknown source or finish, or token ids that are no tuple.
    """

    source: str
    text: str
    token_ids: tuple[int, ...] | None
    finish: str
    sample: int

    def __post_init__(self) -> None:
        check_choice("a candidate's source", self.source, SOURCES)
        check_choice("a candidate's finish", self.finish, FINISHES)
        if self.token_ids is not None and not isinstance(self.token_ids, tuple):
            raise FeedbackError(
                f"a candidate's token_ids are a {type(self.token_ids).__name__}; expected a tuple "
                "of ints or None (an array would compare element by element)."
            )

    @property
    def identity(self) -> tuple[str, object]:
        """Equal for two candidates of a prompt exactly when they are the same response.

        Ids are compared with ids and text with text, never one with the other: a text can have
        several tokenisations, and then "the same" would not be transitive.
        """
        return ("text", self.text) if self.token_ids is None else ("ids", self.token_ids)

    @property
    def is_empty(self) -> bool:
        """Nothing but white space."""
        return not self.text.strip()


@dataclass(frozen=True)
class Pair:
    """What is trained on for one prompt, as indices into its candidates.

    `explored` are the responses over which the optimism term takes its mean, where they are
    several; `explore` is then the first of them.
    """

    chosen: int
    rejected: int
    explore: int
    explored: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A prompt that gives no pair, and why: one of `REASONS`.

    `select` gives all but three: `not_asked`, of a prompt beyond the budget; `not_answered`, of one
    that too few people have ranked; `unusable_answer`, of one with an answer in the data that does
    not become token ids.

    Raises:
        FeedbackError: unknown reason (the report would lose the prompt).
    """

    reason: str

    def __post_init__(self) -> None:
        check_choice("the reason of a drop", self.reason, REASONS)


def ranks(scores: Scores) -> Int[np.ndarray, " candidates"]:
    """Ranks from 1 (highest score); equal scores share the better rank, as in PairRM's own ranking.

    Args:
        scores: `[candidates]`, finite.

    Returns:
        int64 `[candidates]`: 1 + how many scores are strictly higher.

    Raises:
        FeedbackError: not one-dimensional, or not finite (NaN has no rank).
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise FeedbackError(f"scores are {scores!r}; expected a flat list of finite numbers.")
    return 1 + len(values) - np.searchsorted(np.sort(values), values, side="right")


def place(scores: Scores, index: int) -> str:
    """Where candidate `index` stands among all candidates of its prompt.

    Returns:
        `tied` when all scores are equal, else `best` or `worst` for the highest or lowest score,
        shared or not, else `middle`.

    Raises:
        FeedbackError: as `ranks`.
    """
    ranked = ranks(scores)
    if ranked.max() == 1:
        return "tied"
    if ranked[index] == 1:
        return "best"
    return "worst" if ranked[index] == ranked.max() else "middle"


def select(
    candidates: Sequence[Candidate],
    scores: Scores,
    *,
    rule: str = "best_worst",
    explore: str = "greedy",
    ties: str = "drop",
    cut_off: str = "keep",
    min_margin: float = 0.0,
    seed: int | Sequence[int] | None = None,
) -> Pair | Dropped:
    """Picks one prompt's chosen, rejected and explore responses.

    A prompt that fails several tests is dropped for the first reason in this order: `malformed` (a
    score is NaN: what a judge said of that response could not be read), `tie` (the best and worst scores are equal), `equal_text` (chosen and rejected are the same text or
    ids), `empty` (chosen or rejected), `cut_off`, `margin`.

    Args:
        candidates: the prompt's responses; among equal scores the first in this order wins, as
            best and as worst.
        scores: `[candidates]`, higher is better; NaN where a judge was not readable.
        rule: `best_worst` takes the best and worst of all candidates (arXiv 2405.19332, algorithm
            1); `swap` the better and worse of the dataset's chosen and the explore response (the
            other label update of the same paper's appendix D); `top_random` the best, and one
            drawn uniformly from those with a lower score.
        explore: the response of the optimism term, whatever its rank: the first greedy one, the
            first sample, the `best` or `worst` of the model's own (the first of equals), `all` of
            the model's own, over which the term takes its mean, or one drawn uniformly from them,
            which is the same in expectation.
        ties: `drop`, or `first` for the authors' rule: the first candidate is chosen and rejected
            at once and the pair is kept, so that only the optimism term has a gradient.
        cut_off: `drop` refuses a prompt one of whose responses with a role was cut off.
        min_margin: the least chosen score minus rejected score, in the ranker's unit.
        seed: for `random` and `top_random`; one for each prompt, such as (seed, iteration, prompt
            number), since the same seed draws the same place in the list.

    Raises:
        FeedbackError: unknown option, no candidate for a role, a draw without a seed, or scores
            that do not fit the candidates.
    """
    check_choice("rule", rule, RULES)
    check_choice("ties", ties, TIES)
    check_choice("cut_off", cut_off, CUT_OFFS)
    if not 0.0 <= min_margin < float("inf"):
        raise FeedbackError(f"min_margin is {min_margin!r}; expected a number of at least 0.")
    _check_length(candidates, scores)
    if np.isnan(np.asarray(scores, np.float64)).any():
        return Dropped("malformed")
    explorer = _explorer(candidates, scores, explore, seed)
    pool = list(range(len(candidates)))
    if rule == "swap":
        pool = sorted({_first(candidates, "chosen", "rule: swap"), explorer})
    ranked = ranks(np.asarray(scores)[pool])
    # NumPy's argmin and argmax take the first of equals: the authors' rule.
    best, worst = int(ranked.argmin()), int(ranked.argmax())
    tied = bool(ranked.max() == 1)
    if rule == "top_random" and not tied:
        lower = np.argsort(ranked, kind="stable")[(ranked == 1).sum() :]  # by rank, not by place
        worst = int(lower[draws(seed, "rule: top_random", 1).integers(len(lower))])
    explored = tuple(_own(candidates)) if explore == "all" else ()
    pair = Pair(pool[best], pool[worst], explorer, explored if len(explored) > 1 else ())
    if tied and ties == "drop":
        return Dropped("tie")
    chosen, rejected = candidates[pair.chosen], candidates[pair.rejected]
    if not tied and (chosen.text == rejected.text or chosen.identity == rejected.identity):
        return Dropped("equal_text")
    if chosen.is_empty or rejected.is_empty:
        return Dropped("empty")
    others = [candidates[i] for i in explored]
    trained = (chosen, rejected, candidates[pair.explore], *others)
    if cut_off == "drop" and any(each.finish == "length" for each in trained):
        return Dropped("cut_off")
    if scores[pair.chosen] - scores[pair.rejected] < min_margin:
        return Dropped("margin")
    return pair


def _check_length(candidates: Sequence[Candidate], scores: Scores) -> None:
    if len(candidates) != len(scores) or not len(candidates):
        raise FeedbackError(
            f"found {len(candidates)} candidates and {len(scores)} scores; expected one score for "
            "each candidate, and at least one candidate."
        )


def _explorer(
    candidates: Sequence[Candidate],
    scores: Scores,
    explore: str,
    seed: int | Sequence[int] | None,
) -> int:
    check_choice("explore", explore, EXPLORES)
    if explore in ("greedy", "sample"):
        return _first(candidates, explore, f"explore: {explore}")
    own = _own(candidates)
    if not own:
        raise _no_candidate(candidates, "greedy or sample", f"explore: {explore}")
    if explore == "all":
        return own[0]
    if explore == "random":
        return own[int(draws(seed, "explore: random").integers(len(own)))]
    ranked = ranks(np.asarray(scores)[own])
    return own[int(ranked.argmin() if explore == "best" else ranked.argmax())]


def _own(candidates: Sequence[Candidate]) -> list[int]:
    """The model's own responses."""
    return [i for i, each in enumerate(candidates) if each.source in ("greedy", "sample")]


def draws(
    seed: int | Sequence[int] | None, asked: str, stream: int | None = None
) -> np.random.Generator:
    """Random numbers of a prompt. Draws for different ends come from different streams."""
    if seed is None:
        raise FeedbackError(f"{asked} needs a seed for each prompt; found None.")
    key = () if stream is None else (stream,)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _first(candidates: Sequence[Candidate], source: str, asked: str) -> int:
    for index, candidate in enumerate(candidates):
        if candidate.source == source:
            return index
    raise _no_candidate(candidates, source, asked)


def _no_candidate(candidates: Sequence[Candidate], source: str, asked: str) -> FeedbackError:
    found = ", ".join(each.source for each in candidates) or "none"
    return FeedbackError(
        f"{asked} needs a candidate of source {source}; this prompt has: {found}. "
        "Generate one, or ask for another."
    )


def distinct(candidates: Sequence[Candidate], pair: Pair) -> tuple[list[int], dict[str, int]]:
    """The pair's responses without repeats, so that none is computed twice.

    Two candidates are the same response when their token ids are equal, or, without ids, their
    texts (`Candidate.identity`).

    Returns:
        keep: indices into the candidates, one to three, in the order chosen, rejected, explore.
        roles: for each role, its index into `keep`.
    """
    keep: list[int] = []
    seen: dict[object, int] = {}
    roles: dict[str, int] = {}
    for role, index in zip(ROLES, (pair.chosen, pair.rejected, pair.explore), strict=True):
        identity = candidates[index].identity
        if identity not in seen:
            seen[identity] = len(keep)
            keep.append(index)
        roles[role] = seen[identity]
    return keep, roles


@dataclass
class Report:
    """Counts over the prompts of one stage. Every prompt is one pair or one drop.

    Call `add` once for each prompt; read `as_dict`. Counts are integers in `counts`, under the
    keys of `as_dict`.
    """

    counts: Counter[str] = field(default_factory=Counter)
    score_sums: dict[str, float] = field(default_factory=dict)

    def add(
        self, candidates: Sequence[Candidate], scores: Scores | None, result: Pair | Dropped
    ) -> None:
        """Counts one prompt.

        Args:
            candidates: the prompt's responses.
            scores: `[candidates]`; None for a prompt that nobody scored, which is dropped.
            result: what `select` and `label` made of them.

        Raises:
            FeedbackError: scores that do not fit the candidates, or a pair without scores.
        """
        texts = {each.text for each in candidates}
        count = self.counts
        count["prompts"] += 1
        count["candidates"] += len(candidates)
        count["duplicates"] += len(candidates) - len(texts)
        count["empty"] += sum(each.is_empty for each in candidates)
        count["cut_off"] += sum(each.finish == "length" for each in candidates)
        count.update(f"candidates/{each.source}" for each in candidates)
        if isinstance(result, Dropped):
            count["drops"] += 1
            count[f"drops/{result.reason}"] += 1
        if scores is not None:
            self._add_scores(candidates, scores, result)
        elif isinstance(result, Pair):
            raise FeedbackError("found a pair without scores; expected a dropped prompt.")

    def _add_scores(
        self, candidates: Sequence[Candidate], scores: Scores, result: Pair | Dropped
    ) -> None:
        _check_length(candidates, scores)
        count = self.counts
        count["scored"] += 1
        for candidate, score in zip(candidates, scores, strict=True):
            if np.isnan(score):
                continue
            source = candidate.source
            count[f"scored/{source}"] += 1
            self.score_sums[source] = self.score_sums.get(source, 0.0) + float(score)
        if isinstance(result, Dropped) and result.reason == "malformed":
            return
        ranked = ranks(scores)
        count[_tie(ranked)] += 1
        if isinstance(result, Dropped):
            return
        _, roles = distinct(candidates, result)
        count["pairs"] += 1
        count["tie_kept"] += int(ranked[result.chosen] == ranked[result.rejected])
        count["label_against_scores"] += int(ranked[result.chosen] > ranked[result.rejected])
        count[f"winner/{candidates[result.chosen].source}"] += 1
        count[f"explore/{place(scores, result.explore)}"] += 1
        count[f"explore_is/{_shared(roles)}"] += 1

    def as_dict(self) -> dict[str, int | float]:
        """A flat dict for a JSON report. Counts that stayed 0 are there; means of nothing are not.

        Keys:
            prompts, pairs, drops, drops/REASON: prompts = pairs + drops.
            scored: prompts that were asked about and have scores, those dropped as malformed among
                them; ties: those whose scores are all equal; ties_partial: those where only the
                best or the worst score is shared, so that the order of the candidates decides.
            tie_kept: pairs whose chosen and rejected scores are equal (`ties: first`);
                label_against_scores: pairs whose rejected score is the higher (drawn labels).
            candidates, candidates/SOURCE, cut_off, empty: candidates, all, by source, and those
                of a kind; duplicates: candidates whose text an earlier one of the prompt has.
            explore/PLACE: pairs by the place of the explore response among all candidates; of the
                first of them, where all explore.
            explore_is/chosen, rejected, both, neither: pairs by the roles that are the same
                response as explore; winner/SOURCE: pairs by the source of the chosen response.
            score_mean/SOURCE: mean score over all scored candidates of the source, in the ranker's unit.
        """
        means = {
            f"score_mean/{source}": self.score_sums[source] / self.counts[f"scored/{source}"]
            for source in SOURCES
            if source in self.score_sums
        }
        return {key: self.counts[key] for key in _KEYS} | means


_KEYS = (
    *("prompts", "pairs", "drops", *(f"drops/{each}" for each in REASONS)),
    *("scored", "ties", "ties_partial", "tie_kept", "label_against_scores"),
    *("candidates", *(f"candidates/{each}" for each in SOURCES)),
    *("cut_off", "empty", "duplicates"),
    *(f"explore/{each}" for each in PLACES),
    *(f"explore_is/{each}" for each in ("chosen", "rejected", "both", "neither")),
    *(f"winner/{each}" for each in SOURCES),
)


def _tie(ranked: Int[np.ndarray, " candidates"]) -> str:
    if ranked.max() == 1:
        return "ties"
    shared = (ranked == 1).sum() > 1 or (ranked == ranked.max()).sum() > 1
    return "ties_partial" if shared else "ties_none"


def _shared(roles: dict[str, int]) -> str:
    shared = [role for role in ("chosen", "rejected") if roles[role] == roles["explore"]]
    return "both" if len(shared) == 2 else (shared[0] if shared else "neither")
