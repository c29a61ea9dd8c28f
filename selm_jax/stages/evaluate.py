"""The stage `evaluate`: measures the new policy on held-out data.

A language model is evaluated on held-out prompts (heldout.parquet) and pairs
(heldout_pairs.parquet), a reward model on held-out pairs (pairs.parquet). A named held-out set has
tables of its own (heldout-NAME.parquet, ...). If the experiment names tasks of lm-eval, a language
model is measured in these as well (tasks.parquet).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from selm_jax.config import most_in_row
from selm_jax.evaluation import frontier, guard, task_scores
from selm_jax.evaluation import pairs as pair_rewards
from selm_jax.evaluation.answers import Asked, Stored, answer
from selm_jax.evaluation.measuring import Own, Tables, against, measured, scores_of
from selm_jax.evaluation.pairs import pairs_within
from selm_jax.feedback.human import Human
from selm_jax.feedback.ranker import is_relative, judged_by_policy, reported
from selm_jax.parallel import multihost
from selm_jax.policy.policy import Policy
from selm_jax.preferences.examples import Example
from selm_jax.preferences.own_answers import rated_example
from selm_jax.run.inputs import (
    HeldoutSets,
    LazyRanker,
    LazyTasks,
    Model,
    StoredTable,
    of_set,
)
from selm_jax.run.rows import RunError
from selm_jax.shell.progress import Advance
from selm_jax.stages.asking import asked_scores, check_read, unread
from selm_jax.stages.score import too_long
from selm_jax.stages.settings import ANSWERS, SCORING, TEMPLATE
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step, counting
from selm_jax.tables import heldout as table
from selm_jax.tables import heldout_pairs, pairs
from selm_jax.tables import task_scores as tasks_table
from selm_jax.text.answers import answers as answers_of
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt


def _leaves(step: Step, **given: Any) -> tuple[str, ...]:
    longest = most_in_row(step.settings.training.row_length, step.programs.config.max_positions)
    names = []
    for part in _parts(given["heldout"], given["sets"]):
        names.append(of_set("heldout.parquet", part.name))
        if pairs_within(given["chat"], part.prompts, longest)[0]:
            names.append(of_set("heldout_pairs.parquet", part.name))
    return (*names, *(() if given.get("tasks") is None else ("tasks.parquet",)))


@dataclasses.dataclass(frozen=True)
class _Part:
    """A held-out set that is evaluated; `name` is None for `data.heldout`.

    Attributes:
      first: the start model's answers to its prompts; None if the policy is the start model.
    """

    name: str | None
    prompts: list[Prompt]
    first: StoredTable | None = None

    def keyed(self, summary: Mapping[str, float | None]) -> dict[str, float | None]:
        """The metrics of this set by their names in metrics.jsonl."""
        if self.name is None:
            return dict(summary)
        return {
            key.replace("heldout/", f"heldout/{self.name}/", 1): summary[key] for key in summary
        }


def _parts(
    heldout: list[Prompt], sets: HeldoutSets, first: StoredTable | None = None
) -> list[_Part]:
    """The held-out sets of an evaluation: `data.heldout`, then the named ones."""
    named = (_Part(name, mine, sets.answers(name)) for name, mine in sets.prompts.items())
    return [_Part(None, heldout, first), *named]


@stage(
    leaves=_leaves,
    settings=(
        *("seed", "feedback.ranker", "feedback.settings", "evaluation", "objective.beta"),
        *(*ANSWERS, *TEMPLATE, *SCORING, "rollout.slots", "rollout.prefill_rows"),
    ),
    gives=lambda folder: StoredTable(folder, "heldout.parquet"),
)
def evaluate(
    step: Step,
    policy: Model,
    start: Model,
    heldout: list[Prompt],
    ranker: LazyRanker,
    chat: Chat,
    first: StoredTable | None,
    sets: HeldoutSets,
    tasks: LazyTasks | None = None,
) -> Counts:
    """Scores a policy's held-out answers with the ranker, the policy and the start model.

    `_scores` describes the scores; a policy that ranks its own answers gives none. An answer that
    does not fit into a row together with its prompt is counted, and its log-probabilities are null
    in the table.

    `Asked.of_run` describes the sampling. Every iteration uses the same random numbers, so that
    they do not cause differences. `selm eval heldout` runs the same code.

    Args:
      first: the answers of the start model; None if the policy is the start model.
      sets: named held-out sets, each with tables and metrics of its own.
      tasks: the lm-eval tasks of the capability guard, if the experiment names any.
    """
    programs, asked = step.programs, Asked.of_run(step.settings)
    parts = _parts(heldout, sets, first)
    before = [None if part.first is None else table.read(part.first.path) for part in parts]
    model = programs.policy(policy.path, chat)
    # First, because a task that does not fit the model ends the stage before it costs anything.
    of_tasks = {} if tasks is None else _of_tasks(step, model, tasks)
    prompts = sum(len(part.prompts) for part in parts)
    with step.bar(prompts * asked.each, "responses") as advance:
        responses = [answer(model, part.prompts, asked, counting(advance)) for part in parts]
    silent = judged_by_policy(step.settings.feedback.ranker, step.settings.feedback.settings)
    scores = [
        None if silent else _scores(ranker, part.prompts, mine, rows)
        for part, mine, rows in zip(parts, responses, before, strict=True)
    ]
    told = {} if scores[0] is None else multihost.on_first(lambda: reported(ranker.ranker))
    check_read(step, ranker, told)
    own, capability = [], []
    for part, mine, scored, rows in zip(parts, responses, scores, before, strict=True):
        own.append(measured(model, part.prompts, mine, scored))
        # The start model has lost nothing, and where there are pairs, these tell (`_summary`).
        needless = rows is None or bool(own[-1].pairs)
        capability.append(None if needless else guard.of_first(model, part.prompts, rows or ()))
    del model
    reference = None if first is None else programs.policy(start.path, chat)
    found = [against(reference, each) for each in own]
    metrics: dict[str, float | None] = {}
    for part, mine, tables, rows, change in zip(parts, own, found, before, capability, strict=True):
        metrics |= _summary(step, part, mine, tables, rows, change)
    metrics |= of_tasks
    step.log.forget()
    step.log(metrics)
    some = {
        "pairs": sum(len(each.pairs) for each in own),
        "answers_left_out": sum(each.left_out for each in own),
        "pairs_left_out": sum(each.pairs_left_out for each in own),
    }
    return {
        "prompts": prompts,
        "responses": sum(map(len, responses)),
        **{name: n for name, n in some.items() if n},
        **unread(told),
        **{key: value for key, value in metrics.items() if _SHOWN.fullmatch(key)},
        **{f"ranker/{key}": value for key, value in told.items()},
    }


# The metrics that the console shows, of every held-out set.
_SHOWN = re.compile(
    r"heldout/(\w+/)?(reward_greedy|gain|capability|kl|pairs/accuracy)(_low|_high)?"
)


def _summary(
    step: Step,
    part: _Part,
    own: Own,
    found: Tables,
    before: Sequence[table.Row] | None,
    capability: guard.Values | None,
) -> dict[str, float | None]:
    """Writes the tables of one held-out set, and returns its metrics.

    Args:
      before: the start model's answers; None if the policy is the start model.
      capability: the guard's measure, if the set has no pairs.
    """
    if multihost.is_first():
        table.write(step.folder / of_set("heldout.parquet", part.name), found.answers)
        if found.pairs is not None:
            file = of_set("heldout_pairs.parquet", part.name)
            heldout_pairs.write(step.folder / file, found.pairs)
    if before is not None and found.pairs is not None:
        capability = guard.of_pairs(own.pairs, found.pairs)
    beta = step.settings.objective.get("beta", 1.0)
    summary = frontier.summarize(found.answers, before, found.pairs, beta, capability)
    if (lost := guard.warning(summary)) is not None:
        step.say(lost if part.name is None else f"{part.name}: {lost}")
    return part.keyed(summary)


def _of_tasks(step: Step, model: Policy, tasks: LazyTasks) -> dict[str, float | None]:
    """Measures the capability guard's tasks, writes their table, and returns their metrics."""

    @contextlib.contextmanager
    def bar(_title: str, total: int, unit: str) -> Iterator[Advance]:
        with step.bar(total, unit) as advance:
            yield counting(advance)

    rows = tasks.load().measure(model, bar)
    if multihost.is_first():
        tasks_table.write(step.folder / "tasks.parquet", rows)
    start = None if tasks.first is None else tasks_table.read(tasks.first.path)
    metrics = task_scores.summarize(rows, start)
    for line in task_scores.lines(rows, metrics):
        step.say(line)
    return metrics


def _leaves_pairs(_step: Step, **given: Any) -> tuple[str, ...]:
    parts = _parts(given["heldout"], given["sets"])
    return tuple(of_set("pairs.parquet", part.name) for part in parts)


@stage(
    name="evaluate",
    leaves=_leaves_pairs,
    settings=("objective.rates", "data.heldout", "data.on_bad_row", *TEMPLATE, *SCORING),
)
def evaluate_pairs(
    step: Step, policy: Model, heldout: list[Prompt], chat: Chat, sets: HeldoutSets
) -> Counts:
    """Measures how often a reward model prefers the chosen answer of a held-out pair.

    Pairs that are too long are left out and counted if `data.on_bad_row` is `drop`.
    """
    parts = _parts(heldout, sets)
    found = [_rated(step, part, chat) for part in parts]
    model = step.programs.policy(policy.path, chat)
    with step.bar(sum(map(len, found)), "pairs") as advance:
        rewards = [model.rewards([e for *_, e in mine], counting(advance)) for mine in found]
    del model
    metrics: dict[str, float | None] = {}
    for part, mine, of_pairs in zip(parts, found, rewards, strict=True):
        rows = [
            pairs.Row(
                prompt.id, prompt.messages[-1].content,
                chosen=each["chosen"], rejected=each["rejected"],
                reward_chosen=of_pair[e.roles["chosen"]],
                reward_rejected=of_pair[e.roles["rejected"]],
            )
            for (prompt, each, e), of_pair in zip(mine, of_pairs, strict=True)
        ]  # fmt: skip
        if multihost.is_first():
            pairs.write(step.folder / of_set("pairs.parquet", part.name), rows)
        metrics |= part.keyed(pair_rewards.summarize(rows))
    step.log.forget()
    step.log(metrics)
    kept, there = sum(map(len, found)), sum(len(part.prompts) for part in parts)
    shown = re.compile(r"heldout/(\w+/)?accuracy(_low|_high)?")
    counts = {"pairs": kept, "too_long": there - kept}
    return counts | {key: value for key, value in metrics.items() if shown.fullmatch(key)}


def _rated(step: Step, part: _Part, chat: Chat) -> list[tuple[Prompt, Any, Example]]:
    """The held-out pairs of a set that fit a row: prompts, answers by role, and examples."""
    held, head = [(p, answers_of(p)) for p in part.prompts], step.programs.config.head
    assert head is not None
    found = [(p, each, rated_example(chat, head, p, each, {})) for p, each in held]
    if step.task.leaves_out_long(step.settings):
        found = [each for each in found if not too_long(step, each[2])]
    if not found:
        source = step.settings.data.heldout if part.name is None else part.name
        raise RunError(
            f"{source}: all {len(held)} held-out pairs are too long. Shorten "
            "them, or raise training.row_length"
        )
    return found


def _scores(
    ranker: LazyRanker,
    heldout: Sequence[Prompt],
    answers: Sequence[Stored],
    first: Sequence[table.Row] | None,
) -> list[float] | None:
    """The ranker's score of every held-out answer; None if people rank, who see no such prompts.

    A ranker whose scores compare the answers to one prompt gets each answer together with the start
    model's greedy answer.
    """
    people, relative = multihost.on_first(
        lambda: (isinstance(ranker.ranker, Human), is_relative(ranker.ranker))
    )
    if people:
        return None
    beside = None
    if relative and first is None:
        beside = [a.text for a in answers if a.sample == 0]
    elif relative and first is not None:
        of_prompt = {row.prompt_id: row.text for row in first if row.kind == "greedy"}
        beside = [of_prompt[prompt.id] for prompt in heldout]
    return scores_of(partial(asked_scores, ranker), heldout, answers, beside)
