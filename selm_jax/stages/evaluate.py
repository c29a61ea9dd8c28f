"""evaluate: held-out answers of the new policy (heldout.parquet)."""

from __future__ import annotations

import dataclasses

import pyarrow.parquet as pq

from selm_jax import artifacts
from selm_jax.evaluation import frontier
from selm_jax.feedback.human import Human
from selm_jax.preferences.examples import Example
from selm_jax.rollout.engine import Request, decoding_params
from selm_jax.rollout.sampling import Sampling
from selm_jax.run import Run
from selm_jax.stages.generate import Counts, response_row
from selm_jax.stages.rank import question
from selm_jax.stages.score import logps_of


def evaluate(run: Run, t: int) -> Counts:
    """Held-out answers of policy t, greedy and sampled, scored by the ranker and by both models.

    People compare the answers to one prompt and give no reward: under `ranker: human` the scores
    stay empty, and what is measured is how far the policy has gone.

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
    scores = None
    if not isinstance(run.ranker, Human):
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
                "score": None if scores is None else float(scores[i][k]),
                "logp": policy[i][k],
                "logp_start": start[i][k],
            }
        )
    answers = frontier.table(rows)
    artifacts.write_table(run.iteration(t) / "heldout.parquet", answers)
    before = None if t == 0 else pq.read_table(run.iteration(0) / "heldout.parquet")
    summary = frontier.summarize(answers, before)
    run.forget_metrics(lambda m: m["stage"] == "evaluate" and m["iteration"] == t)
    run.log("evaluate", t, summary)
    return {"prompts": len(prompts), "responses": len(responses)} | {
        key: summary[key]
        for key in ("heldout/reward_greedy", "heldout/gain", "heldout/kl")
        if key in summary
    }
