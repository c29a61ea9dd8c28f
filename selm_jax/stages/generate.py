"""generate: the policy's answers, as token ids (responses/part-*.parquet)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from selm_jax import artifacts
from selm_jax.rollout.engine import Request, Response, decoding_params
from selm_jax.run import Run
from selm_jax.text.prompts import Prompt

Counts = dict[str, Any]

RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),  # 0 is the greedy one
        ("kind", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish", pa.string()),
    ]
)


def generate(run: Run, t: int) -> Counts:
    """The start policy of the iteration answers its prompts, part by part.

    Where no candidate is asked of it (an experiment that teaches the data's answers), the parts
    are empty and no model is loaded.
    """
    prompts = run.prompts(t)
    folder = run.iteration(t) / "responses"
    size = run.experiment.rollout.prompts_per_part
    parts = -(-len(prompts) // size)
    wanted = run.experiment.candidates
    params = None
    each = wanted.greedy + wanted.samples
    with run.bar(f"iteration {t}  generate", len(prompts) * each, "responses") as advance:
        for part in range(parts):
            file = folder / f"part-{part:05d}-of-{parts:05d}.parquet"
            mine = range(part * size, min((part + 1) * size, len(prompts)))
            if not file.exists():
                if params is None and each:
                    params = decoding_params(run.load(run.policy(t - 1)), run.dtype)
                requests = [
                    Request(i, run.prompt_ids(prompts[i]), wanted.greedy, wanted.samples)
                    for i in mine
                ]
                responses = []
                if params is not None:
                    responses = run.engine.generate(
                        params, requests, seed=run.experiment.seed, iteration=t, progress=advance
                    )
                rows = [response_row(run, prompts[r.index], r) for r in responses]
                artifacts.write_table(file, pa.Table.from_pylist(rows, schema=RESPONSES))
            else:
                advance(len(mine) * each, 0)
    answers = pq.read_table(folder, schema=RESPONSES)
    return {
        "prompts": len(prompts),
        "responses": answers.num_rows,
        "tokens": pa.compute.sum(pa.compute.list_value_length(answers["token_ids"])).as_py() or 0,
        "cut_off": sum(x == "length" for x in answers["finish"].to_pylist()),
    }


def response_row(run: Run, prompt: Prompt, response: Response) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "sample": response.sample,
        "kind": "greedy" if response.greedy else "sample",
        "token_ids": response.tokens,
        "text": run.chat.text(response.tokens),
        "finish": response.finish,
    }
