"""Asks a judge to compare a model's answers with AlpacaEval's baseline (annotations).

There are two ways to the same numbers. `ask` sends the requests itself, to any OpenAI-compatible
server, and pays for no answer twice; `ask_package` calls the `alpaca_eval` package. Both follow
`weighted_alpaca_eval_gpt4_turbo`: one call per instruction asks for one token, and the
probabilities of `m` (the first output shown) and `M` (the second) are used. Which output is shown
first is random, seeded by the instruction's text. Equal outputs are a draw without a call.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval.instructions import BASELINE, EvalSet
from selm_jax.evaluation.benchmarks.alpaca_eval.score import INSTALL, package
from selm_jax.evaluation.benchmarks.files import read_text
from selm_jax.feedback.judge.answer import Completion
from selm_jax.feedback.judge.client import Client, Messages
from selm_jax.feedback.judge.prompts import Template, weighted_preference
from selm_jax.feedback.judge.unread import PATIENCE, Unread
from selm_jax.shell.progress import Advance

OFFICIAL = "weighted_alpaca_eval_gpt4_turbo"
OFFICIAL_JUDGE = "gpt-4-1106-preview"
_PROMPT_IN_PACKAGE = "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
# SHA-256 of that file in alpaca_eval 0.6.6.
PROMPT_SHA256 = "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62"
# What the package's configuration sends to the official judge. Other judges use temperature 0: vLLM
# reports the sampled token among the five, in place of the fifth most likely one.
SAMPLING: Mapping[str, Any] = {
    "max_tokens": 1, "temperature": 1.0, "top_logprobs": 5, "extra": {"top_p": 1.0},
}  # fmt: skip


@dataclass(frozen=True)
class AnnotatorPrompt:
    """The prompt that asks the judge to compare two answers.

    Attributes:
        template: the text with {instruction}, {output_1} and {output_2}.
        sha256: SHA-256 of its file, in hex.
    """

    template: Template
    sha256: str

    @property
    def official(self) -> bool:
        return self.sha256 == PROMPT_SHA256

    def annotator(self, judge: str, extra: Mapping[str, Any] | None = None) -> str:
        """The annotator's name: the official one only if judge, prompt and request are official."""
        if self.official and judge == OFFICIAL_JUDGE and not extra:
            return OFFICIAL
        prompt = "" if self.official else f"_prompt_{self.sha256[:8]}"
        fields = json.dumps(extra or {}, sort_keys=True).encode()
        return f"weighted_{judge}{prompt}" + (
            f"_extra_{hashlib.sha256(fields).hexdigest()[:8]}" if extra else ""
        )


def read_prompt(file: Path | None = None) -> AnnotatorPrompt:
    """Reads the judge's prompt from a file; by default from the installed `alpaca_eval` package.

    Raises:
        EvaluationError: the prompt was not found.
        selm_jax.feedback.judge.budget.JudgeError: a placeholder is missing or unknown.
    """
    if file is None:
        found = importlib.util.find_spec("alpaca_eval")  # does not import it
        if found is None or found.origin is None:
            raise EvaluationError(
                f"AlpacaEval's prompt for the judge is not included here. Run {INSTALL}, or give a "
                "copy of its alpaca_eval_clf.txt with --prompt."
            )
        file = Path(found.origin).parent / _PROMPT_IN_PACKAGE
    text = read_text(file)
    needs = (("instruction",), ("output_1",), ("output_2",))
    return AnnotatorPrompt(
        Template.parse(text, needs, str(file)), hashlib.sha256(text.encode()).hexdigest()
    )


def is_switched(instruction: str) -> bool:
    """Draws whether the judge sees the model's answer first, as alpaca_eval does (seed 0)."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True], k=1)[0]


def questions(
    instructions: EvalSet, outputs: Sequence[Mapping[str, str]], prompt: AnnotatorPrompt
) -> Iterator[tuple[int, Messages]]:
    """Yields (row, conversation) for every call of the judge that is needed, in order."""
    for i, (instruction, baseline) in enumerate(_pairs(instructions)):
        shown = [baseline, outputs[i]["output"]]
        if shown[0] == shown[1]:
            continue
        if is_switched(instruction):
            shown.reverse()
        values = {"instruction": instruction, "output_1": shown[0], "output_2": shown[1]}
        yield i, prompt.template.fill(values)


async def ask(
    instructions: EvalSet,
    outputs: Sequence[Mapping[str, str]],
    client: Client,
    prompt: AnnotatorPrompt,
    progress: Advance = lambda calls, tokens=0: None,
    allow_missing: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Annotates with this package's client, whose cache keeps answers even if a call fails.

    Args:
        instructions: the instructions with the baseline's answers.
        outputs: the result of `read_outputs`, for the same instructions.
        client: a client that is not open yet.
        allow_missing: how many answers may lack a preference.
        extra: more fields of each request; see `Client.complete`.

    Returns:
        Rows in the order of the instructions; without m or M in the answer, the preference is None.

    Raises:
        selm_jax.feedback.judge.budget.JudgeError: the server gave no answer, or most of its answers
            lack a preference; then no more requests are sent.
    """
    todo = list(questions(instructions, outputs, prompt))
    found: dict[int, Completion] = {}
    watch = Unread(
        f"the judge {client.model}", PATIENCE + allow_missing,
        "Or allow a number of them with --allow-missing, which leaves them out.",
    )  # fmt: skip
    sampling = dict(SAMPLING) | ({} if client.model == OFFICIAL_JUDGE else {"temperature": 0.0})
    sampling["extra"] = {**SAMPLING["extra"], **(extra or {})}

    def usable(answer: Completion) -> bool:
        return weighted_preference(answer) is not None

    def read(number: int, answer: Completion) -> None:
        row = todo[number][0]
        watch.add(None if usable(answer) else f"that to row {row}, {_lack(answer)}")
        found[row] = answer
        progress(1, answer.usage.total if answer.usage else 0)

    async with client:
        await client.complete_all(
            (messages for _, messages in todo), read=read, usable=usable, **sampling
        )
    if watch.malformed > allow_missing:
        watch.end()
    annotator = prompt.annotator(client.model, extra)
    rows = zip(_pairs(instructions), outputs, strict=True)
    return [_row(pair, output, annotator, found.get(i)) for i, (pair, output) in enumerate(rows)]


def _lack(answer: Completion) -> str:
    if not answer.logprobs:
        return f"{answer.text!r:.40}, with no log-probabilities"
    likeliest = ", ".join(repr(token) for token in list(answer.logprobs[0])[:5])
    return f"whose likeliest tokens ({likeliest}) are neither 'm' nor 'M'"


def ask_package(
    instructions: EvalSet, outputs: Sequence[Mapping[str, str]], config: str, cache: Path
) -> list[dict[str, Any]]:
    """Annotates answers with the `alpaca_eval` package instead of this package's client.

    Args:
        config: the name of one of its annotators, or the path of such a configuration.
        cache: the file in which the package caches answers. By default it would use its own folder
            for all projects together.

    Raises:
        EvaluationError: the package is not installed, or fails.
    """
    baseline = [
        dict(row) | {"output": output, "generator": BASELINE}
        for row, (_, output) in zip(outputs, _pairs(instructions), strict=True)
    ]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with package("annotators") as annotators:
        try:
            annotator = annotators.PairwiseAnnotator(
                annotators_config=config, caching_path=str(cache)
            )
            found = annotator.annotate_head2head(
                outputs_1=baseline, outputs_2=[dict(row) for row in outputs]
            )
        except Exception as error:  # the package does not document what it raises
            raise EvaluationError(
                f"the alpaca_eval package, annotator {config!r}, stopped with "
                f"{type(error).__name__}: {error}. The answers so far are in {cache}: fix the "
                "cause and run again."
            ) from error
    return [{key: _plain(value) for key, value in row.items()} for row in found]


def check_ready(instructions: EvalSet, config: str | None) -> None:
    """Checks, before any answers are generated, that they can be annotated.

    Args:
        config: the name of an annotator of the package, if it is to be used.

    Raises:
        EvaluationError: the baseline's answers or the package are missing.
    """
    _pairs(instructions)
    if config is not None:
        with package("annotators"):
            pass


def _pairs(instructions: EvalSet) -> Iterator[tuple[str, str]]:
    if instructions.baseline is None:
        raise EvaluationError(
            f"{instructions.source} has no answers of the baseline {BASELINE}, which the model's "
            "answers are compared with. Give alpaca_eval_gpt4_baseline.json, or any published "
            "annotations.json, with --instructions."
        )
    return zip(instructions.instructions, instructions.baseline, strict=True)


def _row(
    pair: tuple[str, str], output: Mapping[str, str], annotator: str, answer: Completion | None
) -> dict[str, Any]:
    instruction, baseline = pair
    preference: float | None = 1.5  # without an answer: the outputs are equal
    if answer is not None:
        second = weighted_preference(answer)
        preference = None if second is None else 1 + second
        if preference is not None and is_switched(instruction):
            preference = 3 - preference
    return {
        "dataset": output["dataset"],
        "instruction": instruction,
        "output_1": baseline,
        "generator_1": BASELINE,
        "output_2": output["output"],
        "generator_2": output["generator"],
        "annotator": annotator,
        "preference": preference,
        "raw_completion": None if answer is None else _raw(answer),
    }


def _raw(answer: Completion) -> dict[str, Any]:
    """Converts a judge's answer to the format of OpenAI's `choice`, as in published annotations."""
    content = [
        # JSON has no infinity; OpenAI's server sends -9999 for it.
        {"top_logprobs": [{"token": token, "logprob": max(x, -9999.0)} for token, x in top.items()]}
        for top in answer.logprobs or ()
    ]
    return {
        "finish_reason": answer.finish,
        "logprobs": {"content": content},
        "message": {"content": answer.text, "role": "assistant"},
    }


def _plain(value: Any) -> Any:
    """Converts a value to JSON's types: numpy's numbers become Python's, NaN becomes None."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value
