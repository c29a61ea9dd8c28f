"""AlpacaEval 2.0: 805 answers, their annotations, and the numbers of the leaderboard.

    FOLDER/
      answers.jsonl                 answers as generated, with token counts and why they ended
      model_outputs.json            the official package's input
      ANNOTATOR/annotations.json    annotations in the official format
      ANNOTATOR/leaderboard.csv     the model's row
      ANNOTATOR/alpaca_eval.json    the numbers and the files they are based on

`instructions` verifies the instructions before anything is generated, `annotate` asks the judge,
and `score` has the formulas.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import selm_jax
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval import instructions as alpaca_eval_set
from selm_jax.evaluation.benchmarks.alpaca_eval import length_controlled as lc
from selm_jax.evaluation.benchmarks.alpaca_eval import published as alpaca_eval_published
from selm_jax.evaluation.benchmarks.alpaca_eval import score
from selm_jax.evaluation.benchmarks.alpaca_eval.annotate import AnnotatorPrompt, questions
from selm_jax.evaluation.benchmarks.alpaca_eval.instructions import BASELINE, EvalSet
from selm_jax.evaluation.benchmarks.files import TOGETHER, Journal, chunks, file_name, pinned
from selm_jax.evaluation.cost import CHARACTERS_PER_TOKEN, Cost
from selm_jax.evaluation.model import Model
from selm_jax.shell import artifacts
from selm_jax.shell.progress import Advance
from selm_jax.text.conversations import Message


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Sampling settings for a model's answers to AlpacaEval.

    The defaults are those of AlpacaEval's entry for Zephyr 7B; the SELM paper does not give any.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0


def answer(
    model: Model,
    instructions: EvalSet,
    folder: Path,
    decoding: Decoding,
    name: str | None = None,
    progress: Advance = lambda answers, tokens=0: None,
) -> Path:
    """Generates the answers that are still missing, and writes `model_outputs.json`.

    Args:
        name: the `generator` of the answers; by default the model's name.

    Raises:
        EvaluationError, ArtifactError, ChatError: the model cannot answer an instruction, or the
            folder has answers of another model or with other settings.
    """
    name = name or model.name
    if name == BASELINE:
        raise EvaluationError(
            f"the model cannot have the baseline's name {BASELINE}; give another one with --name"
        )
    outputs = folder / "model_outputs.json"
    stages = artifacts.Stages(folder)
    inputs = {"model": pinned(model)}
    settings = dataclasses.asdict(decoding) | {"generator": name, "dtype": _dtype(model)}
    if stages.is_done("answer", inputs, settings):
        return outputs
    began = time.monotonic()
    conversations = [[Message("user", text)] for text in instructions.instructions]
    _check_room(model, conversations, decoding)
    stages.begin("answer", inputs, settings)
    journal = answers_of(folder, instructions)
    todo = [i for i in range(len(conversations)) if i not in journal.rows]
    todo.sort(key=lambda i: len(instructions.instructions[i]))  # similar lengths in one batch
    progress(len(journal.rows), 0)
    for chunk in chunks(todo, 4 * (model.batches.slots or TOGETHER)):
        found = model.reply(
            [conversations[i] for i in chunk], progress=progress, **dataclasses.asdict(decoding)
        )
        journal.add(
            {
                "index": i, "instruction": instructions.instructions[i], "output": each.text,
                "finish": each.finish, "tokens": len(each.token_ids),
            }
            for i, (each,) in zip(chunk, found, strict=True)
        )  # fmt: skip
    rows = [
        {
            "dataset": dataset, "instruction": instruction,
            "output": journal.rows[i]["output"].strip(), "generator": name,
        }
        for i, (dataset, instruction) in enumerate(instructions.rows)
    ]  # fmt: skip
    artifacts.write_json(outputs, rows)
    stages.finish(
        "answer",
        inputs,
        settings,
        {outputs.name: outputs},
        counts(journal),
        time.monotonic() - began,
    )
    return outputs


def _check_room(model: Model, conversations: list[list[Message]], decoding: Decoding) -> None:
    """Checks, before anything is generated, that prompts and answers fit the model's length."""
    lengths = [len(prompt) for prompt in model.prompt_ids(conversations)]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] + decoding.max_new_tokens > model.config.max_positions:
        raise EvaluationError(
            f"{model.name}: instruction {longest} (counted from 0) has {lengths[longest]} tokens "
            f"and its answer up to {decoding.max_new_tokens}, but the model supports only "
            f"{model.config.max_positions} in total. Lower --max-new-tokens."
        )


def answers_of(folder: Path, instructions: EvalSet) -> Journal:
    """Opens the journal of the answers generated so far, by instruction number.

    Raises:
        EvaluationError: an answer belongs to another instruction.
    """
    journal = Journal(folder / "answers.jsonl", lambda row: row["index"])
    for i, row in journal.rows.items():
        if i not in range(len(instructions.rows)) or row["instruction"] != instructions.rows[i][1]:
            raise EvaluationError(
                f"{journal.file}: the answer with index {i!r} is to another instruction. Choose "
                "another folder with --out"
            )
    return journal


def counts(journal: Journal) -> dict[str, int]:
    rows = journal.rows.values()
    return {
        "answers": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "cut_off": sum(row["finish"] == "length" for row in rows),
        "empty": sum(not row["output"].strip() for row in rows),
    }


def numbers(
    rows: Sequence[Mapping[str, Any]],
    gamed: str | None = None,
    gamed_sha256: str | None = None,
    published: Path | None = None,
) -> dict[str, Any]:
    """Computes raw and length-controlled win rates from checked annotations.

    If neither `gamed` nor `published` is given, and df_gamed.csv or the package is missing,
    `length_controlled_winrate` is None and `lc_refused` says why.

    Args:
        gamed, gamed_sha256: see `length_controlled.gamed_file`.
        published: see `published.read`.

    Raises:
        EvaluationError: `gamed` or `published` was given and cannot be used.
    """
    found = score.scores(rows)
    places = alpaca_eval_set.places(rows)
    if published is not None:
        return found | alpaca_eval_published.length_controlled(rows, places, published)
    try:
        file = lc.gamed_file(gamed, gamed_sha256)
        with lc.fitting(rows, places, file) as fit:
            found |= lc.described(fit(None), rows, places, file)
        found["df_gamed_sha256"] = artifacts.digest(file)
    except EvaluationError as error:
        if gamed is not None:
            raise
        found |= {"length_controlled_winrate": None, "lc_refused": str(error)}
    return found


def check_length_control(
    gamed: str | None, gamed_sha256: str | None, published: Path | None
) -> None:
    """Checks, before any paid request, that the length-controlled win rate can be computed.

    Raises:
        EvaluationError: a given file is not the expected one, or the package is not installed.
    """
    if published is not None:
        alpaca_eval_published.read(published)
    if gamed is not None:
        lc.gamed_file(gamed, gamed_sha256)
    if published is not None or gamed is not None:
        with score.package("metrics.glm_winrate"):
            pass


def write_annotations(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes annotations.json into the annotator's folder, as the official package does."""
    path = folder / file_name(rows[0]["annotator"]) / "annotations.json"
    artifacts.write_json(path, rows)
    return path


def write_numbers(
    folder: Path, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], made_of: Mapping
) -> Path:
    """Writes `leaderboard.csv` and `alpaca_eval.json` into the annotator's folder.

    Args:
        made_of: paths of the input files by name; recorded with their SHA-256.
    """
    annotator, model = rows[0]["annotator"], rows[0]["generator_2"]
    text = score.leaderboard(model, found)
    folder = folder / file_name(annotator)
    artifacts.write_text(folder / "leaderboard.csv", text)
    files = {name: {"path": str(path), "sha256": artifacts.digest(path)}
             for name, path in made_of.items()}  # fmt: skip
    record = {
        "benchmark": "AlpacaEval 2.0", "model": model, "baseline": BASELINE,
        "annotator": annotator, **found, "files": files, "selm_jax": selm_jax.__version__,
    }  # fmt: skip
    artifacts.write_json(folder / "alpaca_eval.json", record)
    return folder / "alpaca_eval.json"


def cost_of_answers(model: Model, instructions: EvalSet, folder: Path, decoding: Decoding) -> Cost:
    done = answers_of(folder, instructions).rows
    left = [text for i, text in enumerate(instructions.instructions) if i not in done]
    prompts = model.prompt_ids([[Message("user", text)] for text in left])
    return Cost(
        model.name,
        answers=len(left),
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=len(left) * decoding.max_new_tokens,
    )


def cost_of_judging(
    judge: str,
    instructions: EvalSet,
    prompt: AnnotatorPrompt,
    outputs: Sequence[Mapping[str, str]] | None,
    longest: int,
) -> Cost:
    """Estimates the cost of the judge's annotations of a model's answers.

    Args:
        outputs: None if they have not been generated; then each counts as `longest` tokens.
    """
    empty = [{"output": ""} for _ in instructions.rows]
    asked = list(questions(instructions, outputs or empty, prompt))
    characters = sum(len(m["content"]) for _, messages in asked for m in messages)
    tokens = characters // CHARACTERS_PER_TOKEN + len(asked)  # plus one token per answer
    if outputs is None:
        tokens += len(asked) * longest
    return Cost(judge, judge_calls=len(asked), judge_tokens=tokens)


def _dtype(model: Model) -> str:
    return np.dtype(model.dtype).name
