"""evaluate: held-out answers of the new policy (heldout.parquet), or a reward model's rewards of
held-out pairs (pairs.parquet)."""

from __future__ import annotations

import dataclasses

import pyarrow.parquet as pq

from selm_jax import artifacts
from selm_jax.evaluation import frontier, pairs
from selm_jax.parallel import multihost
from selm_jax.preferences.examples import Example
from selm_jax.rollout.engine import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.run import Run, RunError
from selm_jax.stages.generate import Counts, response_row
from selm_jax.stages.rank import question, scores_of
from selm_jax.stages.score import logps_of, rated_example, rewards_of, too_long
from selm_jax.text.answers import answers as answers_of


def evaluate(run: Run, t: int) -> Counts:
    """Held-out answers of policy t, greedy and sampled, scored by the ranker and by both models.

    Samples are drawn at temperature 1 without filters whatever `rollout` says: only then do they
    estimate the policy's KL. The random numbers are the same in every iteration, so that differences
    are not theirs; their seed is the experiment's plus one, so that they are not those of training.
    """
    if run.objective.rates:
        return _evaluate_pairs(run, t)
    prompts = run.heldout
    e = run.experiment
    params = run.load(run.policy(t))
    requests = [
        Request(i, run.prompt_ids(p), 1, e.evaluation.samples) for i, p in enumerate(prompts)
    ]
    each = 1 + e.evaluation.samples
    with run.bar(f"iteration {t}  evaluate", len(prompts) * each, "responses") as advance:

        def progress(responses: int, tokens: int) -> None:
            advance(responses, tokens)
            multihost.stop_if_told()

        decoding = run.decoding(params)
        engine = dataclasses.replace(run.engine, sampling=Sampling())
        responses = engine.generate(
            decoding, requests, seed=e.seed + 1, iteration=0, progress=progress
        )
        del decoding
    texts = [run.chat.text(r.tokens) for r in responses]
    scores = scores_of(
        run,
        [question(p) for p in prompts],
        [texts[i * each : (i + 1) * each] for i in range(len(prompts))],
    )
    examples = [
        Example(
            prompt.id,
            requests[i].prompt,
            tuple(r.tokens for r in responses[i * each : (i + 1) * each]),
            {},
        )
        for i, prompt in enumerate(prompts)
    ]
    policy = logps_of(run, params, examples)
    del params
    start = policy if t == 0 else logps_of(run, run.load(run.policy(0)), examples)
    rows = []
    for n, (response, text) in enumerate(zip(responses, texts, strict=True)):
        i, k = divmod(n, each)
        rows.append(
            {
                **response_row(run, prompts[i], response),
                "prompt": prompts[i].messages[-1].content,
                "text": text,
                "score": float(scores[i][k]),
                "logp": policy[i][k],
                "logp_start": start[i][k],
            }
        )
    answers = frontier.table(rows)
    before = None if t == 0 else pq.read_table(run.iteration(0) / "heldout.parquet")
    summary = frontier.summarize(answers, before)
    if multihost.is_first():
        artifacts.write_table(run.iteration(t) / "heldout.parquet", answers)
    run.forget_metrics(lambda m: m["stage"] == "evaluate" and m["iteration"] == t)
    run.log("evaluate", t, summary)
    return {"prompts": len(prompts), "responses": len(responses)} | {
        key: summary[key]
        for key in ("heldout/reward_greedy", "heldout/gain", "heldout/kl")
        if key in summary
    }


def _evaluate_pairs(run: Run, t: int) -> Counts:
    """How often reward model t puts the chosen answer of a held-out pair above the rejected one.

    Pairs that are too long are left out and counted where `data.on_bad_row` drops such rows.
    """
    held = [(p, answers_of(p)) for p in run.heldout]
    found = [(p, each, rated_example(run, p, each, {})) for p, each in held]
    if run.experiment.data.on_bad_row == "drop":
        found = [each for each in found if not too_long(run, each[2])]
    if not found:
        raise RunError(
            f"{run.experiment.data.heldout}: all {len(held)} held-out pairs are too long"
        )
    examples = [example for *_, example in found]
    params = run.load(run.policy(t))
    with run.bar(f"iteration {t}  evaluate", len(examples), "pairs") as advance:
        rewards = rewards_of(run, params, examples, lambda done: advance(done, 0))
    del params
    rows = [
        {
            "prompt_id": prompt.id,
            "prompt": prompt.messages[-1].content,
            **each,
            **{f"reward_{role}": of_pair[e.roles[role]] for role in each},
        }
        for (prompt, each, e), of_pair in zip(found, rewards, strict=True)
    ]
    table = pairs.table(rows)
    if multihost.is_first():
        artifacts.write_table(run.iteration(t) / "pairs.parquet", table)
    summary = pairs.summarize(table)
    run.forget_metrics(lambda m: m["stage"] == "evaluate" and m["iteration"] == t)
    run.log("evaluate", t, summary)
    shown = ("heldout/accuracy", "heldout/accuracy_low", "heldout/accuracy_high")
    counts = {"pairs": len(found), "too_long": len(held) - len(found)}
    return counts | {key: summary[key] for key in shown}
