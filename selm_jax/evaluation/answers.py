"""Generates a model's answers once and stores them as JSON lines, to be judged repeatedly.

    {"prompt_id", "messages": [{"role", "content"}, ...], "row": {...}, "sample": 0, "text",
     "finish", "token_ids": [...], "model"}

Sample 0 is the greedy answer; 1, 2, ... are sampled ones. Files of other tools work if they have
`prompt_id`, `messages` (or `prompt`) and `text`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selm_jax.config import Experiment
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.cost import Cost
from selm_jax.evaluation.model import Found, Model
from selm_jax.feedback.ranker import Question
from selm_jax.policy.policy import Policy, numbered
from selm_jax.rollout.sampling import Sampling
from selm_jax.shell import artifacts, jsonl
from selm_jax.shell.progress import Advance, bar
from selm_jax.text.conversations import Message, Prompt, canonical_json
from selm_jax.text.prompts import load_data, load_prompts, prompts_digest


@dataclass(frozen=True)
class Stored:
    """One stored answer to a prompt. `token_ids` is None if another tool wrote the file."""

    prompt_id: str
    messages: tuple[Message, ...]
    sample: int
    text: str
    finish: str = ""
    token_ids: tuple[int, ...] | None = None
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> Question:
        """The prompt as rankers see it."""
        return Question(self.messages[-1].content, self.messages, self.row, self.prompt_id)


@dataclass(frozen=True)
class Asked:
    """The number, length and sampling settings of the answers to generate for each prompt.

    The defaults (temperature 1, no filters) estimate a policy's KL and entropy.

    Attributes:
      greedy: 1 for a greedy answer, 0 for none.
      samples: number of sampled answers.
      limit: maximum tokens of an answer.
    """

    greedy: int = 1
    samples: int = 1
    limit: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.greedy and not self.samples:
            raise EvaluationError("no answers are requested: set greedy to 1, or samples above 0")

    @classmethod
    def of_run(cls, e: Experiment) -> Asked:
        """The number and sampling settings of answers with which a run evaluates its policies.

        Samples are drawn at temperature 1 without filters, regardless of `rollout`: only then do
        they estimate the policy's KL. Their seed is the experiment's plus one, so that their random
        numbers differ from those of training.
        """
        return cls(1, e.evaluation.samples, e.rollout.max_new_tokens, seed=e.seed + 1)

    @property
    def each(self) -> int:
        return self.greedy + self.samples


def prompts_of(
    found: Sequence[Found], file: str | None, split: str | None, limit: int | None
) -> list[Prompt]:
    """Loads the prompts of a file, or by default the held-out prompts of the first run.

    Raises:
      EvaluationError: there is neither a file nor a run with held-out prompts.
      DataError: see `load_prompts`.
    """
    experiment = next((f.experiment for f in found if f.experiment), None)
    system = None
    if file is not None:
        prompts = load_prompts(file, split=split)
    elif experiment is None or experiment.data.heldout is None:
        raise EvaluationError(
            "there are no prompts: without --prompts a run's data.heldout is used, and no given "
            "run has one. Give a file (.jsonl, .parquet, ...) or a Hub data set with --prompts"
        )
    else:
        d = experiment.data
        system, limit = d.system, limit or d.heldout_limit
        prompts = load_data(d, "heldout", pairs=False)
    before = () if system is None else (Message("system", system),)
    return [
        Prompt(p.id, (*before, *p.messages), p.chosen, p.rejected, p.row) for p in prompts[:limit]
    ]


def answer(
    policy: Policy, prompts: Sequence[Prompt], asked: Asked, progress: Advance
) -> list[Stored]:
    """Generates each prompt's answers: the greedy one, then samples.

    As in a run, a prompt's position in the list determines its random numbers.
    """
    ids = policy.prompt_ids([p.messages for p in prompts])
    responses = policy.answer(
        numbered(ids, greedy=asked.greedy, samples=asked.samples), max_new_tokens=asked.limit,
        sampling=Sampling(asked.temperature, top_p=asked.top_p), seed=asked.seed, progress=progress,
    )  # fmt: skip
    found = []
    for r in responses:
        p, text = prompts[r.index], policy.chat.text(r.tokens)
        found.append(Stored(p.id, p.messages, r.sample, text, r.finish, r.tokens, dict(p.row)))
    return found


def kept(model: Model, prompts: Sequence[Prompt], asked: Asked, folder: Path) -> Path:
    """The cache file of a model's answers, named by a hash of weights, prompts and settings."""
    facts = {
        "model": {k: v for k, v in model.folder.origin.items() if k != "source"},
        "prompts": prompts_digest(prompts), "asked": vars(asked), "dtype": str(model.dtype),
        "template": str(model.text), "draws": "by place",
    }  # fmt: skip
    name = hashlib.sha256(canonical_json(facts)).hexdigest()[:12]
    return folder / model.name.replace("/", "--") / f"answers-{name}.jsonl"


def answered(
    model: Model, prompts: Sequence[Prompt], asked: Asked, folder: Path
) -> tuple[list[Stored], Path]:
    """Returns a model's answers and their cache file; generates answers only if none are cached."""
    file = kept(model, prompts, asked, folder)
    if not file.exists():
        total = len(prompts) * asked.each
        with bar(model.console, f"answers of {model.name}", total, "answers") as progress:
            answers = answer(model, prompts, asked, progress)
        write(file, answers, model.name)
    return read(file), file


def cost(model: Model, prompts: Sequence[Prompt], asked: Asked, folder: Path | None) -> Cost:
    """The cost of generating the answers; zero if they are cached."""
    if folder is not None and kept(model, prompts, asked, folder).exists():
        return Cost(f"{model.name} (cached answers)")
    count = len(prompts) * asked.each
    read_ = sum(map(len, model.prompt_ids([p.messages for p in prompts])))
    return Cost(model.name, answers=count, prompt_tokens=read_, new_tokens=count * asked.limit)


def write(file: Path, answers: Iterable[Stored], model: str) -> None:
    lines = [
        {
            "prompt_id": a.prompt_id,
            "messages": [{"role": m.role, "content": m.content} for m in a.messages],
            "row": a.row, "sample": a.sample, "text": a.text, "finish": a.finish,
            "token_ids": a.token_ids, "model": model,
        }
        for a in answers
    ]  # fmt: skip
    artifacts.write_text(file, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))


def read(file: Path) -> list[Stored]:
    """Reads the answers in a file of JSON lines, in the order of the lines.

    Raises:
      EvaluationError: there is no such file, a line is not an answer, or two lines have the same
        prompt and sample.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{file}: answers cannot be read: {error}") from error
    found: dict[tuple[str, int], Stored] = {}
    for line in jsonl.lines(raw):
        one = _parsed(line, f"{file}, line {line.number}")
        if (one.prompt_id, one.sample) in found:
            raise EvaluationError(
                f"{file}, line {line.number}: prompt {one.prompt_id!r} already has an answer with "
                f"`sample` {one.sample}. Give each answer to a prompt its own `sample` number"
            )
        found[one.prompt_id, one.sample] = one
    if not found:
        raise EvaluationError(f"{file}: the file has no answers; expected one JSON line per answer")
    return list(found.values())


def _parsed(line: jsonl.Line, where: str) -> Stored:
    try:
        row = line.value()
        if "messages" not in row:
            row["messages"] = [{"role": "user", "content": row["prompt"]}]
        messages = tuple(Message(str(m["role"]), str(m["content"])) for m in row["messages"])
        name, text = row["prompt_id"], row["text"]
        if not messages or not isinstance(name, str) or not isinstance(text, str):
            raise TypeError("prompt_id and text must be strings, and messages must not be empty")
        ids = row.get("token_ids")
        return Stored(
            name, messages, int(row.get("sample", 0)), text, str(row.get("finish", "")),
            None if ids is None else tuple(map(int, ids)), dict(row.get("row") or {}),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise EvaluationError(
            f"{where}: not an answer: {type(error).__name__}: {error}. Expected an object with "
            "prompt_id, messages (or prompt) and text"
        ) from error


def together(sets: dict[str, list[Stored]]) -> dict[str, dict[tuple[str, int], Stored]]:
    """Checks that all sets of answers have the same prompts; keys answers by (prompt, sample).

    Raises:
      EvaluationError: a set lacks a prompt or sample that another one has, or a conversation
        differs; the message names the first ones.
    """
    keyed = {name: {(a.prompt_id, a.sample): a for a in each} for name, each in sets.items()}
    first, *others = keyed
    for other in others:
        a, b = keyed[first], keyed[other]
        for one, two, x, y in ((first, other, a, b), (other, first, b, a)):
            if lost := [key for key in x if key not in y]:
                listed = ", ".join(f"{p!r} (sample {s})" for p, s in lost[:3])
                raise EvaluationError(
                    f"{two} lacks {len(lost)} of {len(x)} answers that {one} has, for prompts "
                    f"{listed}{', ...' if len(lost) > 3 else ''}. Compare answers to the same "
                    "prompts"
                )
        for key in a:
            if a[key].messages != b[key].messages:
                raise EvaluationError(
                    f"prompt {key[0]!r} differs between {first} and {other}: "
                    f"{a[key].messages[-1].content[:80]!r} and "
                    f"{b[key].messages[-1].content[:80]!r}. Compare answers to the same prompts"
                )
    return keyed
