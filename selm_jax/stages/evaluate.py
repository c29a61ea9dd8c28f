"""The stage `evaluate`: measures the new policy on held-out data.

A language model is evaluated on held-out prompts (heldout.parquet) and pairs
(heldout_pairs.parquet), a reward model on held-out pairs (pairs.parquet).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from selm_jax.config import most_in_row
from selm_jax.evaluation import frontier, guard
from selm_jax.evaluation import pairs as pair_rewards
from selm_jax.evaluation.answers import Asked, Stored, answer
from selm_jax.evaluation.measuring import against, measured, scores_of
from selm_jax.evaluation.pairs import pairs_within
from selm_jax.feedback.human import Human
from selm_jax.feedback.ranker import is_relative, reported
from selm_jax.parallel import multihost
from selm_jax.preferences.own_answers import rated_example
from selm_jax.run.inputs import LazyRanker, Model, StoredTable
from selm_jax.run.rows import RunError
from selm_jax.stages.asking import check_read, unread
from selm_jax.stages.asking import scores_of as ask
from selm_jax.stages.score import too_long
from selm_jax.stages.settings import ANSWERS, SCORING, TEMPLATE
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step, counting
from selm_jax.tables import heldout as table
from selm_jax.tables import heldout_pairs, pairs
from selm_jax.text.answers import answers as answers_of
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt


def _leaves(step: Step, **given: Any) -> tuple[str, ...]:
    longest = most_in_row(step.settings.training.row_length, step.programs.config.max_positions)
    of_data, _ = pairs_within(given["chat"], given["heldout"], longest)
    return ("heldout.parquet", "heldout_pairs.parquet") if of_data else ("heldout.parquet",)


@stage(
    leaves=_leaves,
    settings=(
        *("seed", "feedback.ranker", "feedback.settings", "evaluation", "objective.beta"),
        *(*ANSWERS, *TEMPLATE, *SCORING),
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
) -> Counts:
    """Scores a policy's held-out answers with the ranker, the policy and the start model.

    `_scores` describes the scores. An answer that does not fit into a row together with its prompt
    is counted, and its log-probabilities are null in the table.

    `Asked.of_run` describes the sampling. Every iteration uses the same random numbers, so that
    they do not cause differences. `selm eval heldout` runs the same code.

    Args:
      first: the answers of the start model; None if the policy is the start model.
    """
    programs, asked = step.programs, Asked.of_run(step.settings)
    model = programs.policy(policy.path, chat)
    with step.bar(len(heldout) * asked.each, "responses") as advance:
        responses = answer(model, heldout, asked, counting(advance))
    first_rows = None if first is None else table.read(first.path)
    scores = _scores(ranker, heldout, responses, first_rows)
    told = {} if scores is None else multihost.on_first(lambda: reported(ranker.ranker))
    check_read(step, ranker, told)
    own = measured(model, heldout, responses, scores)
    capability = None
    if first_rows is not None and not own.pairs:
        capability = guard.of_first(model, heldout, first_rows)
    del model
    found = against(None if first is None else programs.policy(start.path, chat), own)
    if multihost.is_first():
        table.write(step.folder / "heldout.parquet", found.answers)
        if found.pairs is not None:
            heldout_pairs.write(step.folder / "heldout_pairs.parquet", found.pairs)
    if first_rows is not None and found.pairs is not None:
        capability = guard.of_pairs(own.pairs, found.pairs)
    beta = step.settings.objective.get("beta", 1.0)
    summary = frontier.summarize(found.answers, first_rows, found.pairs, beta, capability)
    step.log.forget()
    step.log(summary)
    if (lost := guard.warning(summary)) is not None:
        step.say(lost)
    names = ("heldout/reward_greedy", "heldout/gain", "heldout/capability", "heldout/kl")
    names += ("heldout/pairs/accuracy",)
    shown = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    some = {
        "pairs": len(own.pairs),
        "answers_left_out": own.left_out,
        "pairs_left_out": own.pairs_left_out,
    }
    return {
        "prompts": len(heldout),
        "responses": len(responses),
        **{name: n for name, n in some.items() if n},
        **unread(told),
        **{key: summary[key] for key in shown if key in summary},
        **{f"ranker/{key}": value for key, value in told.items()},
    }


@stage(
    name="evaluate",
    leaves=("pairs.parquet",),
    settings=("objective.rates", "data.heldout", "data.on_bad_row", *TEMPLATE, *SCORING),
)
def evaluate_pairs(step: Step, policy: Model, heldout: list[Prompt], chat: Chat) -> Counts:
    """Measures how often a reward model prefers the chosen answer of a held-out pair.

    Pairs that are too long are left out and counted if `data.on_bad_row` is `drop`.
    """
    held, head = [(p, answers_of(p)) for p in heldout], step.programs.config.head
    assert head is not None
    found = [(p, each, rated_example(chat, head, p, each, {})) for p, each in held]
    if step.task.leaves_out_long(step.settings):
        found = [each for each in found if not too_long(step, each[2])]
    if not found:
        raise RunError(
            f"{step.settings.data.heldout}: all {len(held)} held-out pairs are too long. Shorten "
            "them, or raise training.row_length"
        )
    examples = [example for *_, example in found]
    model = step.programs.policy(policy.path, chat)
    with step.bar(len(examples), "pairs") as advance:
        rewards = model.rewards(examples, counting(advance))
    del model
    rows = [
        pairs.Row(
            prompt.id, prompt.messages[-1].content,
            chosen=each["chosen"], rejected=each["rejected"],
            reward_chosen=of_pair[e.roles["chosen"]], reward_rejected=of_pair[e.roles["rejected"]],
        )
        for (prompt, each, e), of_pair in zip(found, rewards, strict=True)
    ]  # fmt: skip
    if multihost.is_first():
        pairs.write(step.folder / "pairs.parquet", rows)
    summary = pair_rewards.summarize(rows)
    step.log.forget()
    step.log(summary)
    shown = ("heldout/accuracy", "heldout/accuracy_low", "heldout/accuracy_high")
    counts = {"pairs": len(found), "too_long": len(held) - len(found)}
    return counts | {key: summary[key] for key in shown}


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
    return scores_of(partial(ask, ranker), heldout, answers, beside)
