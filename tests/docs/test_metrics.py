"""The glossary has every key that can stand in metrics.jsonl and stage.json, and no other."""

import dataclasses
import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.config import Importance
from selm_jax.evaluation import frontier
from selm_jax.evaluation import pairs as rated_pairs
from selm_jax.feedback.human import Human
from selm_jax.feedback.judge import ranker as judge
from selm_jax.feedback.judge.budget import Calls
from selm_jax.feedback.models import pairrm, reward_model
from selm_jax.models.config import DecoderConfig
from selm_jax.models.experts import load_metrics
from selm_jax.objectives.build import TABLE, build_objective
from selm_jax.objectives.losses import Logps, Rewards
from selm_jax.objectives.measures import measures
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.candidates import REASONS, SOURCES
from selm_jax.preferences.examples import Example
from selm_jax.preferences.selection import PLACES
from selm_jax.preferences.selection_report import _KEYS as OF_RANK
from selm_jax.rollout import gap, importance
from selm_jax.shell import memory
from selm_jax.stages import evaluate, export, generate, rank, score, train
from selm_jax.stages.ranking import budget, teach
from selm_jax.stages.ranking.lengths import lengths_of
from selm_jax.tables import heldout, heldout_pairs, pairs, ranked
from selm_jax.training import loop, work
from selm_jax.training.laps import Laps
from selm_jax.training.update import PER_TOKEN

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
RANKERS = (
    "`pairrm`",
    "`reward_model`",
    "`judge`",
    "`human`",
)  # their keys are in the second column


def keys_of(row):
    """The keys that a row of a table is about."""
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    return re.findall(r"`([\w/]+)`", cells[1] if cells[0].strip() in RANKERS else cells[0])


LISTED = {key for row in PAGE.splitlines() if row.startswith("| `") for key in keys_of(row)}
NAMES = {
    "TERM": tuple(TABLE),
    "REASON": REASONS,
    "SOURCE": SOURCES,
    "PLACE": PLACES,
    "ROLE": ("chosen", "rejected", "both", "neither"),
}


def expanded(key):
    """The keys that one line of the page stands for."""
    word = re.search(r"\b[A-Z]+\b", key)
    return {key.replace(word[0], name) for name in NAMES[word[0]]} if word else {key}


KNOWN = {key for line in LISTED for key in expanded(line)}


def of_losses():
    """The metrics of every loss, from calling it."""
    one = {role: jnp.ones(2) for role in ROLES}
    settings = {"beta": 0.1, "alpha": 0.01, "gamma": 0.1, "label_smoothing": 0.1}
    settings |= {"ld_alpha": 0.5}
    found = set()
    for name, factory in TABLE.items():
        wanted = inspect.signature(factory).parameters
        objective = build_objective(name, **{k: v for k, v in settings.items() if k in wanted})
        lengths = {role: jnp.ones(()) for role in ROLES}
        logps = Logps(
            one, one, one, lengths, one, bonus=jnp.ones(2), collision=one,
            shared_policy=one, shared_reference=one,
        )  # fmt: skip
        batch = Rewards(one, one) if objective.rates else logps
        _, metrics = objective(batch)
        found |= {*metrics, *measures(batch, objective)}
    return found


def of_heldout():
    """The metrics of held-out answers, of a table that has all that there can be."""
    ids = [f"p{i}" for i in range(6)]
    rows = [
        heldout.Row(p, "q", kind, n, f"a {p}", (1, 2)[n:], "stop", score + n, -3.0 - i, -4.0)
        for i, p in enumerate(ids)
        for kind, n, score in (("greedy", 0, 0.3 * i), ("sample", 1, 0.2 * i))
    ]
    rows[0] = dataclasses.replace(rows[0], score=np.nan)
    both = [
        heldout_pairs.Row(p, role, logp, -2.0)
        for i, p in enumerate(ids)
        for role, logp in (("chosen", -1.0 - i), ("rejected", -3.0))
    ]
    start = [dataclasses.replace(row, score=0.0) for row in rows]
    return set(frontier.summarize(rows, start, both, 0.1, np.arange(3.0)))


def of_pairs():
    row = pairs.Row("p", "q", "a", "b", 1.0, 0.0)
    return set(rated_pairs.summarize([row, dataclasses.replace(row, reward_chosen=0.0)]))


def of_rankers():
    counted = (*pairrm._COUNTED, *reward_model._COUNTED, *judge._COUNTED, *Calls().as_dict())
    human = re.findall(r'"(\w+)"(?:: |\] = )', inspect.getsource(Human._read))
    return {f"ranker/{key}" for key in (*counted, *human, "cost")}


def of_updates():
    """What the loop adds to a loss's metrics."""
    example = Example.of("x", (1,), {role: (2, n) for n, role in enumerate(ROLES)})
    speed = work.Speed(DecoderConfig(96, 32, 4, 2, 8, 64, (), 1e-5, False, 64, "L"), peak=1.0)
    added = work.tokens_of([example], 9)
    added |= speed.metrics([example], Laps().taken() | {"gradients": 1.0})
    added |= memory.peaks() | dict.fromkeys(["memory/device"])  # which a CPU does not tell
    own = {
        "learning_rate",
        "loss",
        "grad_norm",
        "examples",
        "stage",
        "iteration",
        "step",
        "skipped",
    }
    return {*added, *own, *PER_TOKEN}


def of_gap():
    weights = importance.weights_of(Importance(mode="token_mask"), [np.zeros(1)], [True])
    return {*gap.Gap(1, 0.0, 0.0, 0.0).metrics, *importance.metrics_of([weights])}


def of_experts():
    return set(load_metrics(jnp.ones((1, 2))))


def of_lengths():
    rows = [
        ranked.Row(p, "q", n, "sample", n, (1,) * (n + 1), "a", "stop", n, **{role: True})
        for p in ("p", "q")
        for n, role in enumerate(("chosen", "rejected"))
    ]
    return set(lengths_of(rows))


def of_counts():
    """The literal keys of the counts of every stage."""
    modules = (generate, rank, score, train, export, evaluate, teach, budget)
    source = "".join(inspect.getsource(module) for module in modules)
    source += inspect.getsource(loop.TrainingPlan.counts)
    return set(re.findall(r'"([a-z_/]+)": ', source)) - {"chosen", "rejected"}  # roles


EVERY = (
    of_losses, of_heldout, of_pairs, of_rankers, of_updates, of_experts, of_gap, of_counts,
    of_lengths,
)  # fmt: skip


@pytest.mark.parametrize(
    "found",
    EVERY,
    ids=lambda function: function.__name__,
)
def test_the_glossary_has(found):
    assert not found() - KNOWN


def test_the_glossary_has_what_ranking_counts():
    assert not {*OF_RANK, *(f"score_mean/{source}" for source in SOURCES)} - KNOWN


def test_the_glossary_has_nothing_that_is_never_written():
    written = set().union(*(f() for f in EVERY))
    written |= {*OF_RANK, *(f"score_mean/{source}" for source in SOURCES)}
    loose = {"malformed", "answers", "pairs", "prompts_cut", "responses_cut", "step"}
    never = {key for key in LISTED if not (expanded(key) & (written | loose))}
    assert not never
