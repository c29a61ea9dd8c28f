"""The experiment: frozen dataclasses, read from YAML, changed by dotted overrides.

    experiment = load(Path("experiments/quickstart.yaml"), ["training.global_batch=16"])

Every mistake is an error that names the file, the key and the nearest right key. The field
comments below are the reference of all settings.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from selm_jax.paths import PathError, place
from selm_jax.user_code import UserCodeError, check_name, is_user_code
from selm_jax.words import did_you_mean

_STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """An experiment file that does not say what to do."""


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which 5e-7 is a number; YAML 1.1 wants 5.0e-7 and reads 5e-7 as text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _folder(text: str) -> str:
    """A folder as a person writes it. What does not begin in their home folder stays word for word."""
    try:
        path = place(text)
    except PathError as e:
        raise ValueError(str(e)) from None
    return str(path) if text.startswith("~") else text


@dataclass(frozen=True, config=_STRICT)
class Model:
    source: str  # local Hugging Face folder, Hub id, or GGUF file
    revision: str | None = None  # of a Hub id; what it resolved to is recorded


@dataclass(frozen=True, config=_STRICT)
class Data:
    train: str  # .jsonl, .json, .csv, .tsv, .parquet, .arrow, a folder, or a Hub data set
    heldout: str | None = None  # prompts for evaluation; None evaluates nothing
    train_split: str | None = None  # of a Hub data set
    heldout_split: str | None = None
    train_config: str | None = None  # configuration of a Hub data set, where it has several
    heldout_config: str | None = None
    revision: str | None = None
    prompt: str = "prompt"  # column: text, or a list of messages
    prompt_id: str = "prompt_id"  # column; where it is absent ids are digests of the prompts
    chosen: str | None = None  # columns of a preference data set (UltraFeedback: chosen, rejected)
    rejected: str | None = None
    chosen_score: str | None = None  # columns of numbers: what the two answers are worth. For
    rejected_score: str | None = None  # `margin` of bradley_terry; the second alone is 0 unsaid
    system: str | None = None  # system message put before every prompt
    system_column: str | None = (
        "system"  # column of each row's own, if there is one and `system` is
    )
    # null; null: no column is read so
    portions: int | None = None  # iteration t takes the t-th of so many parts; None: one each
    first_portion: int = 1  # the first iteration's: 2 leaves out what a warm start was trained on
    skip: int = 0  # rows at the front that no portion is cut from
    shuffle: bool = False  # before cutting the portions; the paper does not
    limit: int | None = None  # prompts per iteration at most
    heldout_limit: int | None = None
    on_bad_row: Literal["error", "drop"] = "error"  # also of answers that spell out
    # an end token, and of prompts of more than rollout.max_prompt_tokens
    duplicate_ids: Literal["error", "number"] = "error"  # number: the second p is p#2


@dataclass(frozen=True, config=_STRICT)
class Text:
    layout: Literal["default", "paper"] = "default"  # paper: as the authors' code, to compare with
    max_length: int = 1024  # of prompt + response; `layout: paper` alone cuts texts
    max_prompt_length: int = 512  # what a prompt is cut to where both together are too long
    template: dict[str, Any] = field(default_factory=dict)  # variables: {enable_thinking: false}
    date: datetime.date = datetime.date(2024, 7, 26)  # "today" for templates that write the day;
    # with the real one a run that is resumed tomorrow would have other prompts
    # Control tokens that a message spells out, as `<|im_end|>`: tokens, as elsewhere, or its letters.
    special_tokens: Literal["as_tokens", "as_text"] = "as_tokens"


@dataclass(frozen=True, config=_STRICT)
class Candidates:
    greedy: int = 1  # 1: the policy's likeliest answer competes (the paper's y_ref)
    samples: int = 0  # answers drawn from the policy
    dataset: bool = True  # the data set's chosen and rejected compete too (the paper)


@dataclass(frozen=True, config=_STRICT)
class Remote:
    """A server that answers in place of this program's own engine; see docs/run.md."""

    engine: Literal["vllm", "sglang"]
    url: str = "http://127.0.0.1:8000"
    command: str | None = None  # starts it; {model} is the policy's folder. None: others do
    start_seconds: float = 1800.0  # to wait until it serves that folder
    concurrency: int = 256  # answers asked for at once
    timeout: float = 600.0  # seconds for one answer
    retries: int = 6
    key_env: str | None = None  # environment variable that holds its API key


@dataclass(frozen=True, config=_STRICT)
class Rollout:
    max_new_tokens: int = 1024
    temperature: float = 1.0  # of samples; greedy answers draw nothing
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    slots: int = 16  # responses decoded together, or the next number that the devices divide
    prefill_rows: int = 8  # prompts in one prefill; likewise
    max_prompt_tokens: int = 512  # a longer prompt is an error
    prompts_per_part: int = 256  # a killed run loses at most one part of the responses
    remote: Remote | None = None  # a vLLM or SGLang server that answers; None: this program does


@dataclass(frozen=True, config=_STRICT)
class Labels:
    kind: Literal["scores", "bradley_terry"] = "scores"  # bradley_terry: drawn, by the scores' gap
    temperature: float = 1.0  # of bradley_terry, in the unit of the scores
    flip: float = 0.0  # how often a label is the wrong way round, from 0 to 0.5


@dataclass(frozen=True, config=_STRICT)
class Feedback:
    ranker: str = "sentiment"  # a name of selm_jax.feedback, or package.module:function
    settings: dict[str, Any] = field(default_factory=dict)  # of the ranker
    rule: Literal["best_worst", "swap", "top_random"] = "best_worst"
    # Which is y_ref; all: the optimism term is the mean over all of the policy's own answers.
    explore: Literal["greedy", "sample", "all", "random", "best", "worst"] = "greedy"
    ties: Literal["drop", "first"] = "drop"  # first: as the authors' code
    cut_off: Literal["keep", "drop"] = "keep"  # pairs with an answer cut at max_new_tokens
    min_margin: float = 0.0  # drop pairs whose scores differ by less
    labels: Labels = Labels()  # for studies: how the pair's label comes from the scores
    budget: int | None = None  # prompts per iteration that the ranker is asked about; None: all
    acquisition: Literal["random", "reward_gap", "entropy"] = "random"  # which, under a budget
    prompts_per_part: int = 4096  # ranked between two looks at whether to stop; a killed run loses
    # at most one part of the scores. Few are slow: a reward model reads its weights for each part


@dataclass(frozen=True, config=_STRICT)
class Training:
    learning_rate: tuple[float, ...]  # peak, per iteration; one number serves all
    global_batch: int  # examples per update, exactly
    epochs: int = 1  # over an iteration's examples
    row_length: int = 1024  # tokens of a packed row
    rows: int = 4  # packed rows in one forward and backward pass, on all devices together
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.1
    optimizer: Literal["adamw", "adafactor", "rmsprop"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0  # global norm of the gradient
    reference: Literal["stored", "live"] = "stored"  # live: a second model in memory, same numbers
    # Whose log-probabilities these are: of the policy that each iteration starts from (the paper),
    # or of the run's start model throughout. Answers are the current policy's in both.
    reference_policy: Literal["previous", "start"] = "previous"
    remat: Literal["none", "mlp", "dots", "full"] = "full"
    logprob_chunk: int = 32  # tokens per row whose logits exist at a time
    checkpoint_every: int = 100  # updates
    checkpoints_kept: int = 1  # of an iteration that trains; the newest
    parameter_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, config=_STRICT)
class Lora:
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = "_proj$"  # regular expression over names such as self_attn.q_proj
    rslora: bool = False  # scale alpha / sqrt(rank), not alpha / rank
    base: Literal["full", "int8", "nf4"] = "full"  # int8, nf4: QLoRA, the base in 8 or 4 bits


@dataclass(frozen=True, config=_STRICT)
class Compute:
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, else bfloat16
    preset: Literal["single", "fsdp", "fsdp_tensor"] = "fsdp_tensor"  # single: one device
    data: int = 1  # mesh axes within a slice; -1 takes the devices that are left
    fsdp: int = -1
    tensor: int = 1
    dcn_data: int = -1  # between slices (on GPUs: hosts); -1 takes those that are left
    dcn_fsdp: int = 1
    decode_tensor: int | None = None  # devices of a copy of the model that generates; None: tensor


@dataclass(frozen=True, config=_STRICT)
class Evaluation:
    samples: int = 1  # answers drawn per held-out prompt, for reward and KL at temperature 1


@dataclass(frozen=True, config=_STRICT)
class Log:
    tensorboard: bool = True
    wandb: str | None = None  # project; needs the extra `wandb` and a login


@dataclass(frozen=True, config=_STRICT)
class Experiment:
    output: Annotated[str, AfterValidator(_folder)]  # the run folder
    iterations: int
    model: Model
    data: Data
    objective: dict[str, Any]  # loss: a name or package.module:function; the rest are its settings
    training: Training
    lora: Lora | None = None  # trains adapters; None trains all parameters
    text: Text = Text()
    candidates: Candidates = Candidates()
    rollout: Rollout = Rollout()
    feedback: Feedback = Feedback()
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()
    seed: int = 42

    def learning_rate(self, iteration: int) -> float:
        """The peak of iteration 1, 2, ..."""
        rates = self.training.learning_rate
        return rates[0] if len(rates) == 1 else rates[iteration - 1]

    @property
    def taught(self) -> bool:
        """Whether the data set's answers are taught as they are: none compete, nobody ranks.

        With `data.chosen` alone as answers (loss: sft), with `data.rejected` as pairs (offline dpo).
        """
        c = self.candidates
        return c.dataset and not c.greedy and not c.samples and self.data.chosen is not None

    @property
    def portions(self) -> int:
        return self.data.portions or self.data.first_portion - 1 + self.iterations


def load(file: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment file and applies `key.path=value` overrides (values are YAML)."""
    tree = read(file)
    for override in overrides:
        _set(tree, override)
    return parse(tree, str(file))


def read(file: Path) -> dict[str, Any]:
    """The mapping of a YAML file, not looked at yet. Raises ConfigError where there is none."""
    file = Path(file)
    try:
        tree = yaml.load(file.read_text(), _Yaml)
    except FileNotFoundError as e:
        raise ConfigError(f"{file}: no such experiment file") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{file}: not YAML: {e}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a mapping of settings was expected, found {tree!r}")
    return tree


def parse(tree: Mapping[str, Any], where: str = "experiment") -> Experiment:
    """The experiment that a mapping describes.

    Raises:
      ConfigError: unknown, missing or mistyped keys, all of them listed.
    """
    tree = dict(tree)
    training = tree.get("training")
    if isinstance(training, Mapping) and isinstance(
        training.get("learning_rate"), int | float | str
    ):
        tree["training"] = {**training, "learning_rate": [training["learning_rate"]]}
    try:
        experiment = TypeAdapter(Experiment).validate_python(tree)
    except ValidationError as e:
        problems = "\n  ".join(_explain(error) for error in e.errors())
        raise ConfigError(f"{where}:\n  {problems}") from None
    if problems := list(_inconsistencies(experiment)):
        raise ConfigError(f"{where}:\n  " + "\n  ".join(problems))
    return experiment


def dump(experiment: Experiment) -> str:
    """All settings as YAML, defaults included; `parse` of it gives the experiment back."""
    return yaml.safe_dump(as_dict(experiment), sort_keys=False, allow_unicode=True)


def as_dict(part: Any) -> dict[str, Any]:
    """A (part of an) experiment as plain lists and dictionaries."""

    def plain(x):
        if isinstance(x, datetime.date):
            return x.isoformat()
        return list(x) if isinstance(x, tuple) else x

    def build(items):
        return {key: plain(value) for key, value in items}

    return dataclasses.asdict(part, dict_factory=build)


def _inconsistencies(e: Experiment):
    rates = len(e.training.learning_rate)
    if rates not in (1, e.iterations):
        yield f"training.learning_rate: {rates} values for {e.iterations} iterations"
    if e.iterations < 1:
        yield f"iterations: {e.iterations}, at least 1 was expected"
    if e.data.skip < 0:
        yield f"data.skip: {e.data.skip}, at least 0 was expected"
    if e.data.first_portion < 1:
        yield f"data.first_portion: {e.data.first_portion}, at least 1 was expected"
    if e.iterations > e.portions - e.data.first_portion + 1:
        yield (
            f"data.portions: {e.portions} portions cannot feed {e.iterations} iterations from "
            f"data.first_portion: {e.data.first_portion} on"
        )
    if e.data.system is not None and e.data.system_column not in (None, "system"):
        yield (
            f"data.system_column: {e.data.system_column} is to hold each row's system message, and "
            "data.system is one for all; set one of them"
        )
    yield from _bad_names(e)
    if e.candidates.greedy not in (0, 1):
        yield f"candidates.greedy: {e.candidates.greedy}; there is one greedy answer: 0 or 1"
    if e.taught:
        if e.text.layout == "paper" and not e.data.rejected:
            yield "text.layout: paper lays out pairs; data.rejected names none"
    elif e.candidates.dataset and not (e.data.chosen and e.data.rejected):
        yield (
            "candidates.dataset: the data set's answers are to compete, but data.chosen and "
            "data.rejected do not name their columns. For prompts alone set candidates.dataset: "
            "false and candidates.samples. To teach the data set's answers (loss: sft), name "
            "data.chosen alone and set candidates.greedy: 0"
        )
    yield from _inconsistent_feedback(e)
    if e.data.rejected_score and not e.data.chosen_score:
        yield "data.rejected_score: there is no data.chosen_score to compare it with"
    asks_for_scores = "bradley_terry" in str(e.objective.get("loss")) and e.objective.get("margin")
    if asks_for_scores and not e.data.chosen_score:
        yield (
            "objective.margin: asks for gaps of the data's scores, but data.chosen_score (and "
            "data.rejected_score) name no column of them"
        )
    for key in ("max_length", "max_prompt_length"):
        if e.text.layout != "paper" and getattr(e.text, key) != getattr(Text(), key):
            yield f"text.{key}: only text.layout: paper reads it; the default layout cuts nothing"
    if not 0 < e.text.max_prompt_length < e.text.max_length:
        yield (
            f"text.max_prompt_length: {e.text.max_prompt_length}; at least 1 and less than "
            f"text.max_length ({e.text.max_length}) was expected, or no response would be left"
        )
    count = e.candidates.greedy + e.candidates.samples + 2 * e.candidates.dataset
    if count < 2 and not e.taught:
        yield f"candidates: {count} in all; a pair needs at least 2"
    for key in (
        "global_batch",
        "epochs",
        "row_length",
        "rows",
        "logprob_chunk",
        "checkpoint_every",
        "checkpoints_kept",
    ):
        if getattr(e.training, key) < 1:
            yield f"training.{key}: {getattr(e.training, key)}, at least 1 was expected"
    for key in ("max_new_tokens", "slots", "prefill_rows", "max_prompt_tokens", "prompts_per_part"):
        if getattr(e.rollout, key) < 1:
            yield f"rollout.{key}: {getattr(e.rollout, key)}, at least 1 was expected"
    if e.rollout.remote is not None:
        yield from _inconsistent_remote(e.rollout.remote)
    if e.compute.dcn_fsdp < 1:
        yield f"compute.dcn_fsdp: {e.compute.dcn_fsdp}, at least 1 was expected"
    if e.compute.dcn_data < 1 and e.compute.dcn_data != -1:
        yield f"compute.dcn_data: {e.compute.dcn_data}, at least 1 was expected, or -1"


def _bad_names(e: Experiment):
    """Names of losses and rankers that can stand for none, known without importing anything."""
    loss = e.objective.get("loss")
    if not isinstance(loss, str):
        found = f"{loss!r} is no name" if "loss" in e.objective else "missing"
        yield f"objective.loss: {found}; it names the loss, for instance `selm` or `dpo`"
    for key, name in user_code_in(e):
        try:
            check_name(name)
        except UserCodeError as error:
            yield f"{key}: {name!r}: {error}"


def user_code_in(e: Experiment) -> Iterator[tuple[str, str]]:
    """(dotted key, name) of the functions of the user's that an experiment names."""
    terms = str(e.objective.get("loss")).split("+")
    named: list[tuple[str, Any]] = [("objective.loss", term.strip()) for term in terms]
    todo: list[tuple[str, Any, Any]] = [("feedback", e.feedback.ranker, e.feedback.settings)]
    while todo:
        key, name, settings = todo.pop()
        named.append((f"{key}.ranker", name))
        parts = settings.get("parts") if isinstance(settings, Mapping) else None
        for n, part in enumerate(parts if isinstance(parts, list) else []):
            if isinstance(part, Mapping):
                inner = f"{key}.settings.parts.{n}"
                todo.append((inner, part.get("ranker"), part.get("settings")))
    yield from ((key, name) for key, name in named if isinstance(name, str) and is_user_code(name))


def _inconsistent_remote(r: Remote):
    for key, least in (("concurrency", 1), ("retries", 0), ("timeout", 1), ("start_seconds", 1)):
        if not getattr(r, key) >= least:
            yield f"rollout.remote.{key}: {getattr(r, key)}, at least {least} was expected"
    if r.command is not None:
        try:
            parts = shlex.split(r.command)
        except ValueError as e:
            yield f"rollout.remote.command: {r.command!r}: {e}"
        else:
            if not any("{model}" in part for part in parts[1:]):
                yield (
                    f"rollout.remote.command: {r.command!r}; expected a program and {{model}} among its "
                    "arguments, for the policy's folder"
                )


def _inconsistent_feedback(e: Experiment):
    f = e.feedback
    if f.budget is not None and f.budget < 1:
        yield f"feedback.budget: {f.budget}, at least 1 was expected, or null for all prompts"
    if f.budget is None and f.acquisition != "random":
        yield f"feedback.acquisition: {f.acquisition}; only a feedback.budget has a use for it"
    if f.prompts_per_part < 1:
        yield f"feedback.prompts_per_part: {f.prompts_per_part}, at least 1 was expected"
    if not 0 < f.labels.temperature < float("inf"):
        yield f"feedback.labels.temperature: {f.labels.temperature}, above 0 was expected"
    if not 0 <= f.labels.flip <= 0.5:
        yield f"feedback.labels.flip: {f.labels.flip}, from 0 to 0.5 was expected"


def _set(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: `key.path=value` was expected")
    try:
        value = yaml.load(text, _Yaml)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {override!r}: the value is not YAML: {e}") from e
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {key} is not a group of settings")
    tree[last] = value


def _explain(error: Mapping[str, Any]) -> str:
    path = ".".join(str(x) for x in error["loc"])
    kind = error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [f.name for f in dataclasses.fields(_group(error["loc"][:-1]))]
        hint = did_you_mean(str(error["loc"][-1]), known)
        return f"{path}: unknown key{hint} Known here: {', '.join(known)}."
    if kind in ("missing", "missing_argument"):
        return f"{path}: missing"
    return f"{path}: {error['msg']}, found {error['input']!r}"


def _group(path: Sequence[Any]) -> type:
    """The dataclass that holds the settings at a path of keys."""
    groups = {
        "model": Model, "data": Data, "text": Text, "candidates": Candidates, "rollout": Rollout,
        "feedback": Feedback, "training": Training, "compute": Compute,
        "evaluation": Evaluation, "log": Log, "lora": Lora, "feedback.labels": Labels,
        "rollout.remote": Remote,
    }  # fmt: skip
    return groups[".".join(map(str, path))] if path else Experiment
