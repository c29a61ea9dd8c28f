"""evaluate: the new policy on held-out prompts and pairs (heldout.parquet, heldout_pairs.parquet)."""

from __future__ import annotations

import dataclasses

import pyarrow.parquet as pq

from selm_jax import artifacts
from selm_jax.evaluation import frontier
from selm_jax.evaluation.pairs import answered_pair
from selm_jax.preferences.examples import Example
from selm_jax.rollout.engine import Request, decoding_params
from selm_jax.rollout.sampling import Sampling
from selm_jax.run import Run
from selm_jax.stages.generate import Counts, response_row
from selm_jax.stages.rank import question
from selm_jax.stages.score import logps_of


def evaluate(run: Run, t: int) -> Counts:
    """Held-out answers of policy t, greedy and sampled, scored by the ranker and by both models.

    Samples are drawn at temperature 1 without filters whatever `rollout` says: only then do they
    estimate the policy's KL. The random numbers are the same in every iteration, so that differences
    are not theirs; their seed is the experiment's plus one, so that they are not those of training.
    """
    prompts = run.heldout
    e = run.experiment
    params = run.load(run.policy(t))
    requests = [
        Request(i, run.prompt_ids(p), 1, e.evaluation.samples) for i, p in enumerate(prompts)
    ]
    each = 1 + e.evaluation.samples
    with run.bar(f"iteration {t}  evaluate", len(prompts) * each, "responses") as advance:
        decoding = decoding_params(params, run.dtype)
        engine = dataclasses.replace(run.engine, sampling=Sampling())
        responses = engine.generate(
            decoding, requests, seed=e.seed + 1, iteration=0, progress=advance
        )
        del decoding
    texts = [run.chat.text(r.tokens) for r in responses]
    scores = run.ranker.scores(
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
    pairs, left_out = heldout_pairs(run)
    found = logps_of(run, params, examples + pairs)
    del params
    before = found if t == 0 else logps_of(run, run.load(run.policy(0)), examples + pairs)
    policy, start = found[: len(examples)], before[: len(examples)]
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
    artifacts.write_table(run.iteration(t) / "heldout.parquet", answers)
    pair_table = None
    if pairs:
        pair_table = frontier.pair_table(pairs, found[len(prompts) :], before[len(prompts) :])
        artifacts.write_table(run.iteration(t) / "heldout_pairs.parquet", pair_table)
    first = None if t == 0 else pq.read_table(run.iteration(0) / "heldout.parquet")
    beta = e.objective.get("beta", 1.0)
    summary = frontier.summarize(answers, first, pair_table, beta)
    run.forget_metrics(lambda m: m["stage"] == "evaluate" and m["iteration"] == t)
    run.log("evaluate", t, summary)
    counts = {"prompts": len(prompts), "responses": len(responses)}
    counts |= {"pairs": len(pairs)} if pairs else {}
    return (
        counts
        | left_out
        | {
            key: summary[key]
            for key in (
                "heldout/reward_greedy",
                "heldout/gain",
                "heldout/kl",
                "heldout/pairs/accuracy",
            )
            if key in summary
        }
    )


def has_pairs(run: Run) -> bool:
    """Whether the held-out prompts have a chosen and a rejected answer each can be tried on."""
    return bool(heldout_pairs(run)[0])


def heldout_pairs(run: Run) -> tuple[list[Example], Counts]:
    """The held-out data's own pairs, as far as it has any that fit a row; and how many do not."""
    pairs, left_out = [], 0
    longest = min(run.experiment.training.row_length, run.config.max_positions)
    for prompt in run.heldout:
        if prompt.chosen is None or prompt.rejected is None:
            continue
        example = answered_pair(run.chat, prompt)
        if example is None or example.tokens > longest:
            left_out += 1
        else:
            pairs.append(example)
    return pairs, {"pairs_left_out": left_out} if left_out else {}
