"""Runs `selm eval heldout`: measures checkpoints on held-out prompts and pairs.

Each model answers held-out prompts greedily and by samples at temperature 1. A ranker scores the
answers; a relative one compares each with the reference's greedy answer. The model and a reference
compute log-probabilities of the samples and of the data's own pairs. Every measure is one number
per prompt (`frontier.measures`), so that models are compared prompt by prompt, and several seeds of
a method are pooled with prompts as clusters (`intervals`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from selm_jax.evaluation import EvaluationError, frontier
from selm_jax.evaluation.answers import Asked, answered, cost
from selm_jax.evaluation.contestants import Contestant
from selm_jax.evaluation.cost import CHARACTERS_PER_TOKEN, Cost, judge_cost, judges, show
from selm_jax.evaluation.malformed import Malformed, unread_line
from selm_jax.evaluation.measuring import Own, against, fitting_pairs, measured, scores_of
from selm_jax.evaluation.model import Found, Model
from selm_jax.feedback.ranker import Ranker, is_relative
from selm_jax.preferences.examples import Ids
from selm_jax.shell import artifacts
from selm_jax.shell.memory import release
from selm_jax.statistics.intervals import Estimate, difference, known, pooled
from selm_jax.tables import heldout, heldout_pairs
from selm_jax.text.conversations import Prompt
from selm_jax.text.variety import distinct

Open = Callable[[Found], Model]

# The rows of the printed table: measure -> label.
SHOWN = {
    "reward_greedy": "reward, greedy",
    "reward_sample": "reward, sampled",
    "kl": "KL, nats",
    "entropy": "entropy, nats",
    "accuracy": "pairs right",
    "margins": "their margin",
    "length": "tokens",
    "cut_off": "cut off",
}
# How an answer counts if the judge's verdict on it could not be read; see `JudgeRanker`.
_COUNTED_AS = "no reward: means are over the prompts all of whose answers have one"


@dataclasses.dataclass(frozen=True)
class Seed:
    """The held-out tables and answer file of one model, which is one seed of a method."""

    name: str
    file: str
    answers: list[heldout.Row]
    pairs: list[heldout_pairs.Row] | None
    left_out: int  # number of pairs that cannot be scored
    malformed: int  # number of a judge's answers about it that could not be read


def run(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    ranker: Ranker,
    *,
    open_model: Open,
    reference: Found,
    asked: Asked,
    beta: float,
    out: Path,
    keep: Path,
    allow_malformed: int = 0,
    dry_run: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Evaluates the models and writes `heldout.json` and each model's table into `out`.

    Args:
      contestants: the models; the others are compared with the first one.
      reference: the model against which KL and implicit rewards are measured.
      beta: the factor of the implicit rewards.
      out: a folder that must not exist yet.
      keep: the cache folder of answers; answers in it are not generated again.
      allow_malformed: how many of a judge's answers may be unreadable.

    Raises:
      EvaluationError: the ranker is `human`, the reference has another tokenizer, there are more
        malformed answers than allowed, or `out` exists.
    """
    if ranker.name == "human":
        raise EvaluationError(
            "ranker 'human' works only for training data; give another one with --ranker"
        )
    if dry_run:
        show(_costs(contestants, prompts, open_model, reference, asked, ranker, keep), console)
        return {}
    if out.exists():
        raise EvaluationError(f"{out} already exists. Move it away, or give another --out")
    verdicts = Malformed(allow_malformed, _COUNTED_AS)
    verdicts.watch(ranker)
    beside = None
    if is_relative(ranker):
        first, _ = answered(open_model(reference), prompts, _greedy(asked), keep)
        beside = [each.text for each in first]

    def of(model: Model) -> _Asked:
        answers, file = answered(model, prompts, asked, keep)
        scores = scores_of(ranker.scores, prompts, answers, beside)
        malformed = verdicts.add(ranker)
        ids = model.prompt_ids([p.messages for p in prompts])
        own = measured(model, prompts, answers, scores)
        return _Asked(model.name, file, len(model.tokenizer), ids, own, malformed)

    found = [(c.name, [of(open_model(m)) for m in c.models]) for c in contestants]
    release()
    judge = open_model(reference)
    seeds = {name: [_against(judge, prompts, one) for one in each] for name, each in found}
    report = summarize(seeds, beta=beta)
    report |= {
        "reference": judge.name, "ranker": ranker.name, "asked": dataclasses.asdict(asked),
        "prompts": len(prompts), "beta": beta, **verdicts.record,
    }  # fmt: skip
    if beside is not None:
        report["beside"] = f"{judge.name}, greedy"
    with artifacts.whole(out) as folder:
        folder.mkdir()
        artifacts.write_json(folder / "heldout.json", report)
        for name, each in seeds.items():
            for i, one in enumerate(each):
                stem = f"{name.replace('/', '--')}-{i}"
                heldout.write(folder / f"{stem}.parquet", one.answers)
                if one.pairs is not None:
                    heldout_pairs.write(folder / f"{stem}-pairs.parquet", one.pairs)
    print_report(report, console)
    console.print(f"results: {out}", soft_wrap=True)
    return report


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A model's answers, scores and log-probabilities, before the reference's are added."""

    name: str
    file: Path
    tokens: int  # size of its vocabulary
    prompt_ids: list[Ids]
    own: Own
    malformed: int


def _greedy(asked: Asked) -> Asked:
    return dataclasses.replace(asked, greedy=1, samples=0)


def _against(reference: Model, prompts: Sequence[Prompt], one: _Asked) -> Seed:
    """Adds the reference's log-probabilities to a model's held-out tables.

    Raises:
      EvaluationError: the reference has other tokens.
    """
    ids = reference.prompt_ids([p.messages for p in prompts])
    if len(reference.tokenizer) != one.tokens or ids != one.prompt_ids:
        raise EvaluationError(
            f"{one.name} and the reference {reference.name} have different tokenizers or chat "
            "templates, so a KL between them is meaningless. Give the model that this one was "
            "trained from with --reference"
        )
    found = against(reference, one.own)
    left_out = one.own.pairs_left_out
    return Seed(one.name, str(one.file), found.answers, found.pairs, left_out, one.malformed)


def summarize(seeds: dict[str, list[Seed]], *, beta: float) -> dict[str, Any]:
    """Means with intervals for every compared method, and for its differences from the first one.

    The intervals are over prompts, and also over seeds if a contestant has several.
    """
    by_prompt = {name: _by_prompt(each, beta) for name, each in seeds.items()}
    tables = {name: [one.answers for one in each] for name, each in seeds.items()}
    first = next(iter(by_prompt))
    out: dict[str, Any] = {"contestants": {}}
    for name, values in by_prompt.items():
        each = seeds[name]
        shares = frontier.shares(tables[name])
        report: dict[str, Any] = {
            "models": [one.name for one in each],
            "answers": [one.file for one in each],
            "measures": {k: _fields(pooled(v, share=k in shares)) for k, v in values.items()},
            "by_seed": {
                k: there.mean(axis=1).tolist() if there.size else None
                for k, (there,) in ((k, known(v)) for k, v in values.items())
            },
            "distinct": [_distinct(one.answers) for one in each],
            "entropy_token": [_entropy_per_token(one.answers) for one in each],
        }
        if left_out := [one.left_out for one in each if one.left_out]:
            report["pairs_left_out"] = left_out
        if any(malformed := [one.malformed for one in each]):
            report["malformed"] = malformed
        if name != first:
            of_both = frontier.shares(tables[name] + tables[first])
            report["minus_first"] = {
                k: _fields(difference(v, by_prompt[first][k], share=k in of_both))
                for k, v in values.items()
                if k in by_prompt[first]
            }
        out["contestants"][name] = report
    return out


def _fields(e: Estimate | None) -> dict[str, Any] | None:
    """Converts an estimate to JSON values; None if no prompt has a value."""
    return None if e is None else dataclasses.asdict(e)


def _by_prompt(seeds: Sequence[Seed], beta: float) -> dict[str, Float[np.ndarray, "seeds prompts"]]:
    found = []
    for one in seeds:
        found.append(frontier.measures(one.answers, scored=True))
        if one.pairs is not None:
            found[-1] |= frontier.pair_measures(one.pairs, beta)
    return {name: np.stack([each[name] for each in found]) for name in found[0]}


def _distinct(answers: Sequence[heldout.Row]) -> dict[str, float]:
    """The share of distinct word n-grams in greedy answers or, if there are none, in samples."""
    kind = "greedy" if any(answer.kind == "greedy" for answer in answers) else "sample"
    mine = [answer.text for answer in answers if answer.kind == kind]
    return {f"distinct_{n}": distinct(mine, n) for n in (1, 2, 3)}


def _entropy_per_token(answers: Sequence[heldout.Row]) -> float | None:
    sampled = [a for a in answers if a.kind == "sample" and math.isfinite(a.logp)]
    tokens = sum(len(answer.token_ids) for answer in sampled)
    return -sum(answer.logp for answer in sampled) / tokens if tokens else None


def _costs(
    contestants: Sequence[Contestant], prompts: Sequence[Prompt], open_model: Open,
    reference: Found, asked: Asked, ranker: Ranker, keep: Path,
) -> list[Cost]:  # fmt: skip
    """Upper bounds of the cost of each model and of the judges.

    Scored tokens are counted as if every answer reached its limit.
    """
    parts, scored, answers = [], 0, 0
    for model in (open_model(m) for c in contestants for m in c.models):
        pairs, _ = fitting_pairs(model, prompts)
        read = sum(map(len, model.prompt_ids([p.messages for p in prompts])))
        mine = read + len(prompts) * asked.each * asked.limit + sum(e.tokens for e in pairs)
        parts.append(dataclasses.replace(cost(model, prompts, asked, keep), scored_tokens=mine))
        scored += mine
        answers += len(prompts) * asked.each
    own = Cost(f"{reference.name} (reference)", scored_tokens=scored)
    if is_relative(ranker):
        drawn = cost(open_model(reference), prompts, _greedy(asked), keep)
        own = dataclasses.replace(drawn, what=own.what, scored_tokens=scored)
    parts.append(own)
    limit, models = asked.limit * CHARACTERS_PER_TOKEN, sum(len(c.models) for c in contestants)
    for judge in judges(ranker):
        # A pairwise judge reads two answers, in both orders.
        shown, times = (1, 1) if judge.form == "pointwise" else (2, 2)
        read = sum(shown * limit + len(p.messages[-1].content) for p in prompts) * asked.each
        parts.append(judge_cost(judge, times * answers, times * models * read))
    return parts


def _cell(key: str, measure: dict[str, Any] | None) -> str:
    if measure is None:
        return "not readable" if key.startswith("reward") else "no value"
    e = Estimate(**measure)
    return f"{e}, s.e. {e.stderr:.3f}" if key == "kl" and e.low is not None else str(e)


def print_report(report: dict[str, Any], console: Console) -> None:
    seeds = max(len(c["models"]) for c in report["contestants"].values())
    over = "prompts and seeds" if seeds > 1 else "prompts"
    table = Table(
        title=f"{report['prompts']} held-out prompts; 95 % intervals over {over}; reference: "
        f"{report['reference']}; ranker: {report['ranker']}"
        + (f" (each answer beside that of {report['beside']})" if "beside" in report else ""),
        box=None,
    )
    names = list(report["contestants"])
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for key, label in SHOWN.items():
        found = [c["measures"] for c in report["contestants"].values()]
        if any(key in each for each in found):
            table.add_row(label, *(_cell(key, m[key]) if key in m else "" for m in found))
    for n in (1, 2, 3):
        values = [
            float(np.mean([d[f"distinct_{n}"] for d in c["distinct"]]))
            for c in report["contestants"].values()
        ]
        table.add_row(f"distinct-{n}", *(f"{v:.3f}" for v in values))
    console.print(table)
    for name in names[1:]:
        for key, e in report["contestants"][name]["minus_first"].items():
            if key in SHOWN:
                console.print(
                    f"{name} minus {names[0]}, {SHOWN[key]}: {_cell('', e)}", soft_wrap=True
                )
    if unread := unread_line(report, _COUNTED_AS):
        console.print(unread, soft_wrap=True)
