"""The stages of an iteration: each reads finished files and writes finished files.

    generate    responses/part-*.parquet   the policy's answers, as token ids
    rank        ranked.parquet             every candidate with its score, rank and role
    score       examples.parquet           what is trained on, with reference log-probabilities
    train       checkpoints/               the state of training
    export      model/                     a Hugging Face folder
    evaluate    heldout.parquet            held-out answers of the new policy

Nothing else passes between stages. What each may depend on is written down in `STAGES`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selm_jax import artifacts
from selm_jax.config import as_dict
from selm_jax.evaluation import frontier
from selm_jax.feedback.pairs import Candidate, Dropped, Pair, Report, distinct, ranks, select
from selm_jax.feedback.ranker import Question
from selm_jax.memory import release
from selm_jax.models.decoder import Params
from selm_jax.preferences.examples import ROLES, Example, from_parquet, to_table
from selm_jax.preferences.packing import common_shape
from selm_jax.rollout.engine import Request, Response, decoding_params
from selm_jax.rollout.sampling import Sampling
from selm_jax.run import Run
from selm_jax.text.prompts import Prompt
from selm_jax.text.prompts import digest as prompts_digest
from selm_jax.training.checkpoint import Checkpoints
from selm_jax.training.loop import Plan, response_logps, train
from selm_jax.training.state import TrainState
from selm_jax.weights.export import export_folder

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

RANKED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("candidate", pa.int32()),
        ("source", pa.string()),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish", pa.string()),
        ("score", pa.float64()),
        ("rank", pa.int32()),
        ("chosen", pa.bool_()),
        ("rejected", pa.bool_()),
        ("explore", pa.bool_()),
        ("dropped", pa.string()),  # why the prompt gave no pair; null if it gave one
    ]
)


def generate(run: Run, t: int) -> Counts:
    """The start policy of the iteration answers its prompts, part by part."""
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
                if params is None:
                    params = decoding_params(run.load(run.policy(t - 1)), run.dtype)
                requests = [
                    Request(
                        i, run.chat.prompt_ids(prompts[i].messages), wanted.greedy, wanted.samples
                    )
                    for i in mine
                ]
                responses = run.engine.generate(
                    params, requests, seed=run.experiment.seed, iteration=t, progress=advance
                )
                rows = [_response_row(run, prompts[r.index], r) for r in responses]
                artifacts.write_table(file, pa.Table.from_pylist(rows, schema=RESPONSES))
            else:
                advance(len(mine) * each, 0)
    answers = pq.read_table(folder, schema=RESPONSES)
    return {
        "prompts": len(prompts),
        "responses": answers.num_rows,
        "tokens": pa.compute.sum(pa.compute.list_value_length(answers["token_ids"])).as_py(),
        "cut_off": sum(x == "length" for x in answers["finish"].to_pylist()),
    }


def _response_row(run: Run, prompt: Prompt, response: Response) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "sample": response.sample,
        "kind": "greedy" if response.greedy else "sample",
        "token_ids": response.tokens,
        "text": run.chat.text(response.tokens),
        "finish": response.finish,
    }


def rank(run: Run, t: int) -> Counts:
    """The ranker scores every candidate; best and worst become a pair."""
    prompts = run.prompts(t)
    answers: dict[str, list[dict]] = {}
    for row in pq.read_table(run.iteration(t) / "responses", schema=RESPONSES).to_pylist():
        answers.setdefault(row["prompt_id"], []).append(row)
    candidates = [_candidates(run, prompt, answers.get(prompt.id, [])) for prompt in prompts]
    scores = run.ranker.scores(
        [question(prompt) for prompt in prompts], [[c.text for c in each] for each in candidates]
    )
    f = run.experiment.feedback
    report, rows = Report(), []
    for i, (prompt, each, of_each) in enumerate(zip(prompts, candidates, scores, strict=True)):
        result = select(
            each, of_each, rule=f.rule, explore=f.explore, ties=f.ties, cut_off=f.cut_off,
            min_margin=f.min_margin, seed=(run.experiment.seed, t, i),
        )  # fmt: skip
        report.add(each, of_each, result)
        rows += _ranked_rows(prompt, each, of_each, result)
    artifacts.write_table(
        run.iteration(t) / "ranked.parquet", pa.Table.from_pylist(rows, schema=RANKED)
    )
    return report.as_dict()


def _candidates(run: Run, prompt: Prompt, answers: Sequence[dict]) -> list[Candidate]:
    """The policy's answers, then the data set's chosen and rejected: the authors' order."""
    found = [
        Candidate(a["kind"], a["text"], tuple(a["token_ids"]), a["finish"], a["sample"])
        for a in answers
    ]
    if run.experiment.candidates.dataset:
        for source, text in (("chosen", prompt.chosen), ("rejected", prompt.rejected)):
            assert text is not None  # `load_prompts` was given both columns
            ids = run.chat.response_ids(prompt.messages, text)
            found.append(Candidate(source, text, ids, "dataset", 0))
    return found


def _ranked_rows(prompt: Prompt, candidates, scores, result: Pair | Dropped) -> list[dict]:
    place = ranks(scores)
    pair = result if isinstance(result, Pair) else None
    return [
        {
            "prompt_id": prompt.id,
            "prompt": prompt.messages[-1].content,
            "candidate": i,
            "source": c.source,
            "sample": c.sample,
            "token_ids": c.token_ids,
            "text": c.text,
            "finish": c.finish,
            "score": float(scores[i]),
            "rank": int(place[i]),
            "chosen": pair is not None and i == pair.chosen,
            "rejected": pair is not None and i == pair.rejected,
            "explore": pair is not None and i == pair.explore,
            "dropped": result.reason if isinstance(result, Dropped) else None,
        }
        for i, c in enumerate(candidates)
    ]


def question(prompt: Prompt) -> Question:
    """A prompt as rankers see it."""
    return Question(prompt.messages[-1].content, prompt.messages, prompt.row, prompt.id)


def score(run: Run, t: int) -> Counts:
    """The reference, which is the iteration's start policy, scores every response once."""
    examples = _examples(run, t)
    if not examples:
        artifacts.write_table(run.iteration(t) / "examples.parquet", to_table([]))
        return {"examples": 0, "responses": 0, "tokens": 0}
    params = run.load(run.policy(t - 1))
    with run.bar(f"iteration {t}  score", len(examples), "examples") as advance:
        logps = _logps(run, params, examples, lambda done: advance(done, 0))
    scored = [
        dataclasses.replace(e, reference=found) for e, found in zip(examples, logps, strict=True)
    ]
    artifacts.write_table(run.iteration(t) / "examples.parquet", to_table(scored))
    return {
        "examples": len(examples),
        "responses": sum(len(e.responses) for e in examples),
        "tokens": sum(e.tokens for e in examples),
    }


def _logps(
    run: Run, params: Params, examples: Sequence[Example], report=lambda done: None
) -> list[tuple[float, ...]]:
    """Log-probability of every response of every example."""
    settings = run.experiment.training
    shape = common_shape([examples], rows=settings.rows, time=settings.row_length)
    return response_logps(
        examples, shape, lambda batch: run.update.logps(params, run.place(batch)), report
    )


def _examples(run: Run, t: int) -> list[Example]:
    """The pairs of ranked.parquet, as token ids, a response with two roles once."""
    prompts = {p.id: p for p in run.prompts(t)}
    rows: dict[str, list[dict]] = {}
    for row in pq.read_table(run.iteration(t) / "ranked.parquet", schema=RANKED).to_pylist():
        if row["dropped"] is None:
            rows.setdefault(row["prompt_id"], []).append(row)
    examples = []
    for prompt_id, each in rows.items():
        candidates = [
            Candidate(r["source"], r["text"], tuple(r["token_ids"]), r["finish"], r["sample"])
            for r in each
        ]
        pair = Pair(*(next(i for i, r in enumerate(each) if r[role]) for role in ROLES))
        keep, roles = distinct(candidates, pair)
        ids = run.chat.prompt_ids(prompts[prompt_id].messages)
        responses = tuple(tuple(each[i]["token_ids"]) for i in keep)
        examples.append(Example(prompt_id, ids, responses, roles))
    return examples


def train_policy(run: Run, t: int) -> Counts:
    """Updates from the start policy, or from the last checkpoint of this stage."""
    e = run.experiment
    plan = Plan.make(e.training, from_parquet(run.iteration(t) / "examples.parquet"), e.seed, t)
    checkpoints = Checkpoints(run.iteration(t) / "checkpoints")
    if not checkpoints.has_final:
        params = run.load(run.policy(t - 1))
        state = TrainState.create(params, run.optimizer)
        state = checkpoints.latest(state) or state
        del params
        reference = run.load(run.policy(t - 1)) if e.training.reference == "live" else None
        run.forget_metrics(
            lambda m: (
                m["stage"] == "train"
                and (m["iteration"] > t or (m["iteration"] == t and m["step"] > int(state.step)))
            )
        )
        with run.bar(f"iteration {t}  train", len(plan.updates), "updates") as advance:
            advance(int(state.step), 0)

            def report(metrics):
                run.log("train", t, metrics)
                advance(1, metrics["tokens"])

            state = train(
                plan, run.update, state, checkpoints,
                peak=e.learning_rate(t), place=run.place, reference=reference, report=report,
            )  # fmt: skip
        checkpoints.save_final(state.params)
    return plan.counts()


def export(run: Run, t: int) -> Counts:
    """The trained parameters as a Hugging Face folder, complete with tokenizer and card."""
    checkpoints = Checkpoints(run.iteration(t) / "checkpoints")
    if not checkpoints.has_final:
        raise artifacts.ArtifactError(
            f"{checkpoints.folder}: the trained parameters are missing. Remove 'train' from "
            f"{run.iteration(t) / 'stage.json'} to train this iteration again"
        )
    params = checkpoints.final(run.abstract_params)
    with artifacts.whole(run.iteration(t) / "model") as partial:
        export_folder(params, run.config, run.start.path, partial, run.model_card(t))
    return {"parameters": run.parameters}


def evaluate(run: Run, t: int) -> Counts:
    """Held-out answers of policy t, greedy and sampled, scored by the ranker and by both models.

    Samples are drawn at temperature 1 without filters whatever `rollout` says: only then do they
    estimate the policy's KL. The random numbers are the same in every iteration, so that differences are not theirs; their
    seed is the experiment's plus one, so that they are not those of training either.
    """
    prompts = run.heldout
    e = run.experiment
    params = run.load(run.policy(t))
    requests = [
        Request(i, run.chat.prompt_ids(p.messages), 1, e.evaluation.samples)
        for i, p in enumerate(prompts)
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
    policy = _logps(run, params, examples)
    del params
    start = policy if t == 0 else _logps(run, run.load(run.policy(0)), examples)
    rows = []
    for n, (response, text) in enumerate(zip(responses, texts, strict=True)):
        i, k = divmod(n, each)
        rows.append(
            {
                **_response_row(run, prompts[i], response),
                "prompt": prompts[i].messages[-1].content,
                "text": text,
                "score": float(scores[i][k]),
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


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, and all that its outcome may depend on.

    `inputs` are digests by name; `settings` are the experiment's by dotted key; `outputs` are the
    files and folders of the iteration that it leaves and that must stay as they are.
    """

    name: str
    work: Callable[[Run, int], Counts]
    inputs: Callable[[Run, int], Mapping[str, str]]
    settings: Callable[[Run, int], Mapping[str, Any]]
    outputs: tuple[str, ...]

    def run(self, run: Run, t: int) -> bool:
        """Does the stage unless it is done; says whether it did."""
        record = artifacts.Stages(run.iteration(t))
        inputs, settings = self.inputs(run, t), self.settings(run, t)
        if record.is_done(self.name, inputs, settings):
            return False
        began = time.perf_counter()
        record.begin(self.name, inputs, settings)
        counts = self.work(run, t)
        seconds = time.perf_counter() - began
        outputs = {name: run.iteration(t) / name for name in self.outputs}
        record.finish(self.name, inputs, settings, outputs, counts, seconds)
        release()  # or the next stage's peak would stand on this one's leavings
        run.say(self.name, t, counts, seconds)
        return True


def _policy(run: Run, t: int) -> dict[str, str]:
    return {"policy": artifacts.digest(run.policy(t))}


def _file(name: str) -> Callable[[Run, int], dict[str, str]]:
    return lambda run, t: {name: artifacts.digest(run.iteration(t) / name)}


def _prompts(run: Run, t: int) -> dict[str, str]:
    return {"prompts": prompts_digest(run.prompts(t))}


def _heldout(run: Run, t: int) -> dict[str, str]:
    return {"heldout": prompts_digest(run.heldout), "start": _policy(run, 0)["policy"]}


def _all(*parts: Callable[[Run, int], Mapping[str, str]]) -> Callable[[Run, int], dict[str, str]]:
    return lambda run, t: {k: v for part in parts for k, v in part(run, t).items()}


def _pick(*keys: str) -> Callable[[Run, int], dict[str, Any]]:
    """Settings by dotted key; a key of a group stands for all its settings."""

    def of(run: Run, t: int) -> dict[str, Any]:
        tree, found = as_dict(run.experiment), {}
        for key in keys:
            value: Any = tree
            for part in key.split("."):
                value = value[part]
            if isinstance(value, dict):
                found |= {f"{key}.{k}": v for k, v in value.items()}
            else:
                found[key] = value
        if "training.learning_rate" in found:
            found["training.learning_rate"] = run.experiment.learning_rate(t)
        # Where and in which portions the work is done changes nothing about what comes out.
        return {k: v for k, v in found.items() if k not in _FREE}

    return of


_FREE = {"rollout.slots", "rollout.prefill_rows", "training.checkpoint_every"}
_ANSWERS = ("rollout.max_new_tokens", "rollout.max_prompt_tokens")
_SCORING = ("training.row_length", "training.rows", "training.logprob_chunk", "compute.dtype")

STAGES = (
    Stage(
        "generate",
        generate,
        _all(_prompts, lambda run, t: _policy(run, t - 1)),
        _pick("seed", "candidates.greedy", "candidates.samples", "rollout", "compute.dtype"),
        ("responses",),
    ),
    Stage(
        "rank",
        rank,
        _all(_prompts, _file("responses")),
        _pick("seed", "candidates.dataset", "feedback"),
        ("ranked.parquet",),
    ),
    Stage(
        "score",
        score,
        _all(_file("ranked.parquet"), lambda run, t: _policy(run, t - 1)),
        _pick(*_SCORING),
        ("examples.parquet",),
    ),
    Stage(
        "train",
        train_policy,
        _all(_file("examples.parquet"), lambda run, t: _policy(run, t - 1)),
        _pick("seed", "objective", "training", "compute.dtype"),
        (),
    ),
    Stage(
        "export",
        export,
        _all(_file("examples.parquet"), lambda run, t: _policy(run, t - 1)),
        _pick(),
        ("model",),
    ),
)
EVALUATE = Stage(
    "evaluate",
    evaluate,
    _all(_heldout, _policy),
    _pick("seed", "feedback.ranker", "feedback.settings", "evaluation", *_ANSWERS, *_SCORING),
    ("heldout.parquet",),
)
