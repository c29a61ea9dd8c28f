"""evaluate: the new policy on held-out prompts and pairs (heldout.parquet, heldout_pairs.parquet), or
a reward model's rewards of held-out pairs (pairs.parquet)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from selm_jax.evaluation import frontier
from selm_jax.evaluation import pairs as pair_rewards
from selm_jax.evaluation.pairs import answered_pair
from selm_jax.feedback.human import Human
from selm_jax.feedback.ranker import is_relative, reported, scores_beside
from selm_jax.parallel import multihost
from selm_jax.preferences.examples import Example
from selm_jax.preferences.own_answers import rated_example
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.run.rows import RunError, question
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.stages.asking import check_read, scores_of, unread
from selm_jax.stages.generate import Counts
from selm_jax.stages.score import too_long
from selm_jax.tables import heldout, heldout_pairs, pairs
from selm_jax.text.answers import answers as answers_of
from selm_jax.text.prompts import Prompt


def evaluate(run: Run, t: int) -> Counts:
    """Held-out answers of policy t, greedy and sampled, scored by the ranker and by both models.

    What the scores are: see `_scores`. An answer that does not fit a row even alone with its prompt
    has no log-probabilities, which are null in the table; it is counted. All else is known of it.

    Samples are drawn at temperature 1 without filters whatever `rollout` says: only then do they
    estimate the policy's KL. The random numbers are the same in every iteration, so that differences
    are not theirs; their seed is the experiment's plus one, so that they are not those of training.
    """
    if run.task.rates:
        return _evaluate_pairs(run, t)
    prompts = run.heldout
    e = run.experiment
    params = run.programs.load(run.policy(t))
    requests = [
        Request(i, run.data.prompt_ids(p), 1, e.evaluation.samples) for i, p in enumerate(prompts)
    ]
    each = 1 + e.evaluation.samples
    with run.bar(f"iteration {t}  evaluate", len(prompts) * each, "responses") as advance:

        def progress(responses: int, tokens: int) -> None:
            advance(responses, tokens)
            multihost.stop_if_told()

        decoding = run.programs.decoding(params)
        engine = dataclasses.replace(run.programs.engine, sampling=Sampling())
        responses = engine.generate(
            decoding, requests, seed=e.seed + 1, iteration=0, progress=progress
        )
        del decoding
    texts = [run.chat.text(r.tokens) for r in responses]
    scores = _scores(run, t, [texts[i * each : (i + 1) * each] for i in range(len(prompts))])
    told = {} if scores is None else multihost.on_first(lambda: reported(run.ranker))
    check_read(run, told)
    examples, places = [], []  # places: which responses an example scores
    for i, prompt in enumerate(prompts):
        mine = range(i * each, (i + 1) * each)
        whole = Example(prompt.id, requests[i].prompt, tuple(responses[n].tokens for n in mine), {})
        for example, of in in_rows(whole, e.training.row_length):
            examples.append(example)
            places.append([mine[k] for k in of])
    left_out = len(responses) - sum(map(len, places))
    of_data, pairs_left_out = fitting_pairs(run, run.heldout)
    scorer = run.programs.scorer
    found = scorer.logps(params, examples + of_data)
    del params
    before = found if t == 0 else scorer.logps(run.programs.load(run.policy(0)), examples + of_data)
    policy, start = (_by_response(places, of[: len(places)]) for of in (found, before))
    rows = []
    for n, (response, text) in enumerate(zip(responses, texts, strict=True)):
        i, k = divmod(n, each)
        rows.append(
            heldout.Row(
                prompts[i].id,
                prompts[i].messages[-1].content,
                "greedy" if response.greedy else "sample",
                response.sample,
                text,
                response.tokens,
                response.finish,
                score=math.nan if scores is None else float(scores[i][k]),
                logp=policy.get(n, math.nan),
                logp_start=start.get(n, math.nan),
            )
        )
    n = len(examples)
    of_pairs = frontier.pair_rows(of_data, found[n:], before[n:]) if of_data else None
    if multihost.is_first():
        heldout.write(run.folder.iteration(t) / "heldout.parquet", rows)
        if of_pairs is not None:
            heldout_pairs.write(run.folder.iteration(t) / "heldout_pairs.parquet", of_pairs)
    first = None if t == 0 else _answers_of_start(run)
    beta = e.objective.get("beta", 1.0)
    summary = frontier.summarize(rows, first, of_pairs, beta)
    run.folder.forget(lambda m: m["stage"] == "evaluate" and m["iteration"] == t)
    run.folder.log("evaluate", t, summary)
    names = ("heldout/reward_greedy", "heldout/gain", "heldout/kl", "heldout/pairs/accuracy")
    shown = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    return {
        "prompts": len(prompts),
        "responses": len(responses),
        **({"pairs": len(of_data)} if of_data else {}),
        **({"answers_left_out": left_out} if left_out else {}),
        **pairs_left_out,
        **unread(told),
        **{key: summary[key] for key in shown if key in summary},
        **{f"ranker/{key}": value for key, value in told.items()},
    }


def in_rows(example: Example, longest: int) -> list[tuple[Example, tuple[int, ...]]]:
    """The example, or if it is longer than a row one example for each response that fits; and which
    of its responses each has.

    Held-out prompts are whole, those trained on may be cut: a row need not hold one with all answers.
    """
    every = tuple(range(len(example.responses)))
    if example.tokens <= longest:
        return [(example, every)]
    alone = [dataclasses.replace(example, responses=(r,)) for r in example.responses]
    return [(one, (k,)) for k, one in zip(every, alone, strict=True) if one.tokens <= longest]


def _by_response(
    places: Sequence[Sequence[int]], found: Sequence[Sequence[float]]
) -> dict[int, float]:
    return {
        n: logp
        for of, logps in zip(places, found, strict=True)
        for n, logp in zip(of, logps, strict=True)
    }


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
    params = run.programs.load(run.policy(t))
    with run.bar(f"iteration {t}  evaluate", len(examples), "pairs") as advance:
        rewards = run.programs.scorer.rewards(params, examples, lambda done: advance(done, 0))
    del params
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


def _scores(run: Run, t: int, answers: Sequence[Sequence[str]]) -> list[Any] | None:
    """The score of every held-out answer, by prompt; None of people, who are asked about nothing else
    than what is trained on.

    A ranker whose scores compare the answers of one prompt gets each answer beside the start
    model's greedy one.
    """
    people, relative = multihost.on_first(
        lambda: (isinstance(run.ranker, Human), is_relative(run.ranker))
    )
    if people:
        return None
    questions = [question(p) for p in run.heldout]
    if not relative:
        return scores_of(run, questions, answers)
    first = [each[0] for each in answers]  # the greedy one
    if t > 0:
        start = _answers_of_start(run)
        of_prompt = {row.prompt_id: row.text for row in start if row.kind == "greedy"}
        first = [of_prompt[q.id] for q in questions]
    return scores_beside(partial(scores_of, run), questions, answers, first)


def _answers_of_start(run: Run) -> list[heldout.Row]:
    record = artifacts.Stages(run.folder.iteration(0))
    record.digest("heldout.parquet")  # which is as it was written
    return heldout.read(record.folder / "heldout.parquet")


def has_pairs(run: Run) -> bool:
    """Whether the held-out prompts have a chosen and a rejected answer each can be tried on."""
    return bool(fitting_pairs(run, run.heldout)[0])


def fitting_pairs(run: Run, prompts: Iterable[Prompt]) -> tuple[list[Example], Counts]:
    """The prompts' own pairs, as far as they have any that fit a row; and how many do not."""
    found, left_out = [], 0
    longest = min(run.experiment.training.row_length, run.programs.config.max_positions)
    for prompt in prompts:
        if prompt.chosen is None or prompt.rejected is None:
            continue
        example = answered_pair(run.chat, prompt)
        if example is None or example.tokens > longest:
            left_out += 1
        else:
            found.append(example)
    return found, {"pairs_left_out": left_out} if left_out else {}
