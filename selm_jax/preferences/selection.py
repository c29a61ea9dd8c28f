"""Pure functions that turn scores into preference pairs.

    select(candidates, scores, rule=RULES["swap"], explore=EXPLORES["greedy"], seed=(42, 1, 0))

`select` calls two small functions that an experiment names and a user can write: a rule, which
picks the chosen and the rejected response, and an explore rule, which picks the responses for the
optimism term. `select` itself handles ties, equal texts, empty and cut off responses, and the
margin.

If scores tie, the order of the candidates decides. The authors' order is the model's own response,
then the dataset's chosen, then its rejected (online_feedback.py in the code published with arXiv
2405.19332).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar, cast, get_args

import numpy as np
from jaxtyping import Float64, Int, Real

from selm_jax.config import CutOff, ExploreName, Feedback, RuleName, Ties
from selm_jax.preferences.candidates import Candidate, Dropped, FeedbackError, Pair, check_choice
from selm_jax.shell.user_code import UserCodeError, described, function_at, is_user_code

TIES = get_args(Ties)
CUT_OFFS = get_args(CutOff)
PLACES = ("best", "middle", "worst", "tied")

Scores: TypeAlias = Sequence[float] | Real[np.ndarray, " candidates"]
Known: TypeAlias = Float64[np.ndarray, " candidates"]  # finite scores, read-only

# `(candidates, scores, rng)` to the pair, or to the reason why there is none. `select` fills in the
# pair's `explore`; the candidates in the optimism term have `explored` set.
Rule: TypeAlias = Callable[[Sequence[Candidate], Known, np.random.Generator], Pair | Dropped]
# `(candidates, scores, rng)` to the candidate, or the candidates, for the optimism term.
Explore: TypeAlias = Callable[
    [Sequence[Candidate], Known, np.random.Generator], int | Sequence[int]
]


def ranks(scores: Scores) -> Int[np.ndarray, " candidates"]:
    """Ranks from 1 (highest score); equal scores share the better rank, as in PairRM.

    Args:
        scores: `[candidates]`, finite.

    Returns:
        int64 `[candidates]`: 1 + how many scores are strictly higher.

    Raises:
        FeedbackError: if the scores are not one-dimensional, or not finite (NaN has no rank).

    >>> ranks([0.5, 0.9, 0.5, 0.1]).tolist()
    [2, 1, 2, 4]
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise FeedbackError(f"scores are {scores!r}; expected a flat list of finite numbers.")
    return 1 + len(values) - np.searchsorted(np.sort(values), values, side="right")


def place(scores: Scores, index: int) -> str:
    """The place of a candidate in its prompt's ranking: `best`, `middle`, `worst` or `tied`.

    Returns:
        `tied` if all scores are equal; otherwise `best` or `worst` for the highest or lowest score
        (even if shared), and `middle` for any other.

    Raises:
        FeedbackError: as for `ranks`.

    >>> [place([0.5, 0.9, 0.5, 0.1], i) for i in range(4)]
    ['middle', 'best', 'middle', 'worst']
    """
    ranked = ranks(scores)
    if ranked.max() == 1:
        return "tied"
    if ranked[index] == 1:
        return "best"
    return "worst" if ranked[index] == ranked.max() else "middle"


# Rules. Among equal scores NumPy's argmin and argmax take the first, like the authors' code.


def best_worst(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> Pair:
    """Picks the best and the worst of all candidates (arXiv 2405.19332, algorithm 1).

    >>> best_worst([], np.array([0.5, 0.9, 0.1]), np.random.default_rng(0))
    Pair(chosen=1, rejected=2, explore=-1, explored=())
    """
    ranked = ranks(scores)
    return Pair(int(ranked.argmin()), int(ranked.argmax()))


def swap(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> Pair:
    """Ranks the data's chosen response against y_ref (the paper's appendix D)."""
    own = next(i for i, candidate in enumerate(candidates) if candidate.explored)
    data = _first(candidates, "chosen", "rule: swap")
    if own == data:
        raise FeedbackError(
            "rule: swap compares the data's chosen with y_ref, but feedback.explore picked the "
            "data's chosen as y_ref. Set feedback.explore to pick one of the model's own responses."
        )
    first, second = sorted((own, data))
    return Pair(first, second) if scores[first] >= scores[second] else Pair(second, first)


def top_random(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> Pair:
    """Picks the best candidate, and one drawn uniformly from those with a lower score."""
    ranked = ranks(scores)
    best = int(ranked.argmin())
    lower = np.argsort(ranked, kind="stable")[(ranked == 1).sum() :]  # by rank, not by place
    return Pair(best, int(lower[rng.integers(len(lower))]) if len(lower) else best)


# Explore rules: which response is y_ref, whatever its rank.


def greedy(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> int:
    """The model's greedy response, as in the paper."""
    return _first(candidates, "greedy", "explore: greedy")


def sample(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> int:
    """The model's first sampled response."""
    return _first(candidates, "sample", "explore: sample")


def all_own(
    candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator
) -> Sequence[int]:
    """All of the model's own responses; the optimism term is their mean."""
    return _own(candidates, "all")


def random_own(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> int:
    """One of the model's own responses, drawn uniformly; in expectation the same as `all`."""
    own = _own(candidates, "random")
    return own[int(rng.integers(len(own)))]


def best_own(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> int:
    """The best of the model's own responses; the first of them if several are equally good."""
    own = _own(candidates, "best")
    return own[int(ranks(scores[own]).argmin())]


def worst_own(candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator) -> int:
    """The worst of the model's own responses; the first of them if several are equally bad."""
    own = _own(candidates, "worst")
    return own[int(ranks(scores[own]).argmax())]


RULES: Mapping[RuleName, Rule] = {
    "best_worst": best_worst,
    "swap": swap,
    "top_random": top_random,
}
EXPLORES: Mapping[ExploreName, Explore] = {
    "greedy": greedy,
    "sample": sample,
    "all": all_own,
    "random": random_own,
    "best": best_own,
    "worst": worst_own,
}

_F = TypeVar("_F", Rule, Explore)


def rule_named(name: str) -> Rule:
    """The rule that `feedback.rule` names: a built-in rule or the user's own function.

    Raises:
        FeedbackError: if there is no such rule, or it cannot be called as
            `function(candidates, scores, rng)`.
    """
    return _named("feedback.rule", name, RULES)


def explore_named(name: str) -> Explore:
    """The explore rule that `feedback.explore` names; raises as `rule_named` does."""
    return _named("feedback.explore", name, EXPLORES)


def _named(key: str, name: str, table: Mapping[Any, _F]) -> _F:
    if not is_user_code(name):
        check_choice(key, name, tuple(table))
        return table[name]
    try:
        return cast(_F, function_at(name, "candidates", "scores", "rng"))
    except UserCodeError as error:
        raise FeedbackError(f"{key} {name!r}: {error}.") from error


def select(
    candidates: Sequence[Candidate],
    scores: Scores,
    *,
    rule: Rule = best_worst,
    explore: Explore = greedy,
    ties: str = "drop",
    cut_off: str = "keep",
    min_margin: float = 0.0,
    seed: int | Sequence[int],
) -> Pair | Dropped:
    """Picks one prompt's chosen, rejected and explored responses.

    A prompt that fails several tests is dropped for the first reason in this order: `malformed` (a
    score is NaN because the judge's answer could not be read), the rule's own reason, `tie` (chosen
    and rejected have equal scores), `equal_text` (they have the same text or ids), `empty` (one of
    them), `cut_off`, `margin`.

    Args:
        candidates: the prompt's responses. Among equal scores the first in this order is picked,
            both as best and as worst.
        scores: `[candidates]`, higher is better; NaN where the judge's answer could not be read.
        rule: picks chosen and rejected; see `RULES`.
        explore: picks the responses of the optimism term; see `EXPLORES`.
        ties: `drop`, or `first` for the authors' rule: the first of the two becomes both chosen
            and rejected, and the pair is kept, so that only the optimism term has a gradient.
        cut_off: `drop` drops a prompt if a response with a role was cut off.
        min_margin: the smallest allowed difference of the two scores, in the ranker's unit.
        seed: for the random choices of the rules. Use a different one for each prompt, such as
            (seed, iteration, prompt number): the same seed draws the same place in the list.

    Raises:
        FeedbackError: if an option is unknown, a role has no candidate, there is not one score per
            candidate, or a rule raises or returns something invalid (the message names it).
    """
    check_choice("ties", ties, TIES)
    check_choice("cut_off", cut_off, CUT_OFFS)
    if not 0.0 <= min_margin < float("inf"):
        raise FeedbackError(f"min_margin is {min_margin!r}; expected a number of at least 0.")
    check_length(candidates, scores)
    known = np.array(scores, np.float64)
    known.flags.writeable = False  # otherwise one rule could change the scores for the next one
    if np.isnan(known).any():
        return Dropped("malformed")
    if not np.isfinite(known).all():
        raise FeedbackError(f"scores are {scores!r}; expected a flat list of finite numbers.")
    explored = _explored(explore, tuple(candidates), known, draws(seed, "feedback.explore"))
    marked = tuple(
        dataclasses.replace(each, explored=i in explored) for i, each in enumerate(candidates)
    )
    pair = _picked(rule, marked, known, draws(seed, "feedback.rule", 1))
    if isinstance(pair, Dropped):
        return pair
    gap = float(abs(known[pair.chosen] - known[pair.rejected]))
    if gap == 0.0 and ties == "drop":
        return Dropped("tie")
    if gap == 0.0:
        first = min(pair.chosen, pair.rejected)
        pair = Pair(first, first)
    chosen, rejected = candidates[pair.chosen], candidates[pair.rejected]
    if pair.chosen != pair.rejected and (
        chosen.text == rejected.text or chosen.identity == rejected.identity
    ):
        return Dropped("equal_text")
    if chosen.is_empty or rejected.is_empty:
        return Dropped("empty")
    trained = (chosen, rejected, *(candidates[i] for i in explored))
    if cut_off == "drop" and any(each.finish == "length" for each in trained):
        return Dropped("cut_off")
    if gap < min_margin:
        return Dropped("margin")
    return Pair(pair.chosen, pair.rejected, explored[0], explored if len(explored) > 1 else ())


def by_settings(f: Feedback) -> Callable[..., Pair | Dropped]:
    """Binds `select` to the `feedback` settings; call the result with candidates, scores, seed.

    Raises:
        FeedbackError: if a rule cannot be found or called.
    """
    return partial(
        select, rule=rule_named(f.rule), explore=explore_named(f.explore), ties=f.ties,
        cut_off=f.cut_off, min_margin=f.min_margin,
    )  # fmt: skip


def check_length(candidates: Sequence[Candidate], scores: Scores) -> None:
    if len(candidates) != len(scores) or not len(candidates):
        raise FeedbackError(
            f"there are {len(candidates)} candidates and {len(scores)} scores; expected one score "
            "for each candidate, and at least one candidate."
        )


def draws(
    seed: int | Sequence[int] | None, asked: str, stream: int | None = None
) -> np.random.Generator:
    """The random number generator of a prompt; different streams are independent."""
    if seed is None:
        raise FeedbackError(f"{asked} needs a seed for each prompt; pass `seed`.")
    key = () if stream is None else (stream,)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# Users can write rules, so everything that a rule returns is checked.


def _explored(
    explore: Explore, candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator
) -> tuple[int, ...]:
    """The indices of the candidates that an explore rule picks, in increasing order."""
    result = _call(explore, candidates, scores, rng)
    several = result if isinstance(result, Sequence | np.ndarray) else [result]
    places = tuple(_index(explore, result, each, len(candidates)) for each in several)
    if not places or len(set(places)) < len(places):
        raise _refused(
            explore, result, "an index into `candidates`, or a list of different indices"
        )
    return tuple(sorted(places))


def _picked(
    rule: Rule, candidates: Sequence[Candidate], scores: Known, rng: np.random.Generator
) -> Pair | Dropped:
    """The pair that a rule picks, as plain integers; `explore` is not filled in yet."""
    result = _call(rule, candidates, scores, rng)
    if isinstance(result, Dropped):
        return result
    if not isinstance(result, Pair):
        raise _refused(rule, result, "a Pair or a Dropped of selm_jax.preferences.candidates")
    pair = Pair(
        _index(rule, result, result.chosen, len(candidates)),
        _index(rule, result, result.rejected, len(candidates)),
    )
    if result.explore != pair.explore or result.explored:
        raise _refused(
            rule,
            result,
            "Pair(chosen, rejected) alone; feedback.explore picks the explored responses",
        )
    if pair.chosen == pair.rejected and ranks(scores).max() > 1:
        raise _refused(
            rule, result, 'two different indices, or Dropped("rule") if the prompt has no pair'
        )
    return pair


def _call(function: Rule | Explore, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except FeedbackError:
        raise
    except Exception as error:
        raise FeedbackError(
            f"{described(function)} raised {type(error).__name__}: {error}"
        ) from error


def _index(function: Rule | Explore, result: Any, value: Any, count: int) -> int:
    try:
        place = -1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        place = -1
    if not 0 <= place < count:
        raise _refused(function, result, f"indices from 0 to {count - 1}, as whole numbers")
    return place


def _refused(function: Rule | Explore, result: Any, expected: str) -> FeedbackError:
    return FeedbackError(f"{described(function)} returned {result!r}; expected {expected}.")


def _own(candidates: Sequence[Candidate], explore: ExploreName) -> list[int]:
    """The indices of the model's own responses; raises FeedbackError if there are none."""
    own = [i for i, each in enumerate(candidates) if each.source in ("greedy", "sample")]
    if not own:
        raise _no_candidate(candidates, "greedy or sample", f"explore: {explore}")
    return own


def _first(candidates: Sequence[Candidate], source: str, asked: str) -> int:
    for index, candidate in enumerate(candidates):
        if candidate.source == source:
            return index
    raise _no_candidate(candidates, source, asked)


def _no_candidate(candidates: Sequence[Candidate], source: str, asked: str) -> FeedbackError:
    found = ", ".join(each.source for each in candidates) or "none"
    return FeedbackError(
        f"{asked} needs a candidate of source {source}; this prompt has: {found}. "
        "Generate such a candidate, or choose another rule."
    )
