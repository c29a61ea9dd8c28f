"""evaluate: the new policy on held-out prompts and pairs (heldout.parquet, heldout_pairs.parquet), or
a reward model's rewards of held-out pairs (pairs.parquet)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from selm_jax.evaluation import frontier
from selm_jax.evaluation import pairs as pair_rewards
from selm_jax.evaluation.answers import Asked, Stored, answer
from selm_jax.evaluation.measuring import against, measured, scores_of
from selm_jax.evaluation.pairs import pairs_within
from selm_jax.feedback.human import Human
from selm_jax.feedback.ranker import is_relative, reported
from selm_jax.parallel import multihost
from selm_jax.preferences.examples import Example
from selm_jax.preferences.own_answers import rated_example
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.stages.asking import check_read, unread
from selm_jax.stages.asking import scores_of as ask
from selm_jax.stages.generate import Counts
from selm_jax.stages.score import too_long
from selm_jax.tables import heldout, heldout_pairs, pairs
from selm_jax.text.answers import answers as answers_of
from selm_jax.text.prompts import Prompt


def evaluate(run: Run, t: int) -> Counts:
    """Held-out answers of policy t, greedy and sampled, scored by the ranker and by both models.

    What the scores are: see `_scores`. An answer that does not fit a row even alone with its prompt
    has no log-probabilities, which are null in the table; it is counted. All else is known of it.

    How answers are drawn: see `Asked.of_run`. The random numbers are the same in every iteration, so
    that differences are not theirs. `selm eval heldout` takes the same path.
    """
    if run.task.rates:
        return _evaluate_pairs(run, t)
    prompts, e = run.heldout, run.experiment
    policy, asked = run.programs.policy(run.policy(t), run.chat), Asked.of_run(e)
    with run.bar(f"iteration {t}  evaluate", len(prompts) * asked.each, "responses") as advance:

        def progress(responses: int, tokens: int) -> None:
            advance(responses, tokens)
            multihost.stop_if_told()

        responses = answer(policy, prompts, asked, progress)
    scores = _scores(run, t, responses)
    told = {} if scores is None else multihost.on_first(lambda: reported(run.ranker))
    check_read(run, told)
    own = measured(policy, prompts, responses, scores)
    del policy
    start = None if t == 0 else run.programs.policy(run.policy(0), run.chat)
    found = against(start, own)
    if multihost.is_first():
        heldout.write(run.folder.iteration(t) / "heldout.parquet", found.answers)
        if found.pairs is not None:
            heldout_pairs.write(run.folder.iteration(t) / "heldout_pairs.parquet", found.pairs)
    first = None if t == 0 else _answers_of_start(run)
    beta = e.objective.get("beta", 1.0)
    summary = frontier.summarize(found.answers, first, found.pairs, beta)
    run.folder.forget(lambda m: m["stage"] == "evaluate" and m["iteration"] == t)
    run.folder.log("evaluate", t, summary)
    names = ("heldout/reward_greedy", "heldout/gain", "heldout/kl", "heldout/pairs/accuracy")
    shown = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    return {
        "prompts": len(prompts),
        "responses": len(responses),
        **_counts(
            pairs=len(own.pairs),
            answers_left_out=own.left_out,
            pairs_left_out=own.pairs_left_out,
        ),
        **unread(told),
        **{key: summary[key] for key in shown if key in summary},
        **{f"ranker/{key}": value for key, value in told.items()},
    }


def _counts(**numbers: int) -> Counts:
    return {name: n for name, n in numbers.items() if n}


def _evaluate_pairs(run: Run, t: int) -> Counts:
    """How often reward model t puts the chosen answer of a held-out pair above the rejected one.

    Pairs that are too long are left out and counted where `data.on_bad_row` drops such rows.
    """
    held, head = [(p, answers_of(p)) for p in run.heldout], run.programs.config.head
    assert head is not None
    found = [(p, each, rated_example(run.chat, head, p, each, {})) for p, each in held]
    if run.experiment.data.on_bad_row == "drop":
        found = [each for each in found if not too_long(run, each[2])]
    if not found:
        raise RunError(
            f"{run.experiment.data.heldout}: all {len(held)} held-out pairs are too long"
        )
    examples = [example for *_, example in found]
    policy = run.programs.policy(run.policy(t), run.chat)
    with run.bar(f"iteration {t}  evaluate", len(examples), "pairs") as advance:
        rewards = policy.rewards(examples, advance)
    del policy
    rows = [
        pairs.Row(
            prompt.id,
            prompt.messages[-1].content,
            chosen=each["chosen"],
            rejected=each["rejected"],
            reward_chosen=of_pair[e.roles["chosen"]],
            reward_rejected=of_pair[e.roles["rejected"]],
        )
        for (prompt, each, e), of_pair in zip(found, rewards, strict=True)
    ]
    if multihost.is_first():
        pairs.write(run.folder.iteration(t) / "pairs.parquet", rows)
    summary = pair_rewards.summarize(rows)
    run.folder.forget(lambda m: m["stage"] == "evaluate" and m["iteration"] == t)
    run.folder.log("evaluate", t, summary)
    shown = ("heldout/accuracy", "heldout/accuracy_low", "heldout/accuracy_high")
    counts = {"pairs": len(found), "too_long": len(held) - len(found)}
    return counts | {key: summary[key] for key in shown}


def _scores(run: Run, t: int, answers: Sequence[Stored]) -> list[float] | None:
    """The score of every held-out answer; None of people, who are asked about nothing else than what
    is trained on.

    A ranker whose scores compare the answers of one prompt gets each answer beside the start
    model's greedy one.
    """
    people, relative = multihost.on_first(
        lambda: (isinstance(run.ranker, Human), is_relative(run.ranker))
    )
    if people:
        return None
    beside = None
    if relative and t == 0:
        beside = [a.text for a in answers if a.sample == 0]
    elif relative:
        start = _answers_of_start(run)
        of_prompt = {row.prompt_id: row.text for row in start if row.kind == "greedy"}
        beside = [of_prompt[prompt.id] for prompt in run.heldout]
    return scores_of(partial(ask, run), run.heldout, answers, beside)


def _answers_of_start(run: Run) -> list[heldout.Row]:
    record = artifacts.Stages(run.folder.iteration(0))
    record.digest("heldout.parquet")  # which is as it was written
    return heldout.read(record.folder / "heldout.parquet")


def has_pairs(run: Run) -> bool:
    """Whether the held-out prompts have a chosen and a rejected answer each can be tried on."""
    return bool(fitting_pairs(run, run.heldout)[0])


def fitting_pairs(run: Run, prompts: Iterable[Prompt]) -> tuple[list[Example], Counts]:
    """The prompts' own pairs, as far as they have any that fit a row; and how many do not."""
    longest = min(run.experiment.training.row_length, run.programs.config.max_positions)
    found, left_out = pairs_within(run.chat, prompts, longest)
    return found, _counts(pairs_left_out=left_out)
