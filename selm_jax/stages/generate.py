"""generate: the policy's answers, as token ids (responses/part-*.parquet)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from selm_jax import artifacts
from selm_jax.parallel import multihost
from selm_jax.rollout.engine import Request, Response
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
    size = run.experiment.rollout.prompts_per_part
    files = response_files(run, t)
    there = multihost.on_first(lambda: [file.exists() for file in files])
    wanted = run.experiment.candidates
    params = None
    each = wanted.greedy + wanted.samples
    with run.bar(f"iteration {t}  generate", len(prompts) * each, "responses") as advance:

        def progress(responses: int, tokens: int) -> None:
            advance(responses, tokens)
            multihost.stop_if_told()  # the part is lost, the parts before it are not

        for part, file in enumerate(files):
            mine = range(part * size, min((part + 1) * size, len(prompts)))
            if there[part]:
                advance(len(mine) * each, 0)
                continue
            if params is None and each:
                params = run.decoding(run.load(run.policy(t - 1)))
            requests = [
                Request(i, run.prompt_ids(prompts[i]), wanted.greedy, wanted.samples) for i in mine
            ]
            responses = []
            if params is not None:
                responses = run.engine.generate(
                    params, requests, seed=run.experiment.seed, iteration=t, progress=progress
                )
            if part % multihost.count() == multihost.index():  # all know it, each writes its parts
                rows = [response_row(run, prompts[r.index], r) for r in responses]
                artifacts.write_table(file, pa.Table.from_pylist(rows, schema=RESPONSES))
    multihost.barrier()
    artifacts.wait_for(files)
    answers = pa.concat_tables([pq.read_table(file, schema=RESPONSES) for file in files])
    return {
        "prompts": len(prompts),
        "responses": answers.num_rows,
        "tokens": pa.compute.sum(pa.compute.list_value_length(answers["token_ids"])).as_py() or 0,
        "cut_off": sum(x == "length" for x in answers["finish"].to_pylist()),
    }


def response_files(run: Run, t: int) -> list[Path]:
    """The parts of iteration t's responses; the same however many processes write them."""
    parts = -(-len(run.prompts(t)) // run.experiment.rollout.prompts_per_part)
    folder = run.iteration(t) / "responses"
    return [folder / f"part-{part:05d}-of-{parts:05d}.parquet" for part in range(parts)]


def response_row(run: Run, prompt: Prompt, response: Response) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "sample": response.sample,
        "kind": "greedy" if response.greedy else "sample",
        "token_ids": response.tokens,
        "text": run.chat.text(response.tokens),
        "finish": response.finish,
    }
