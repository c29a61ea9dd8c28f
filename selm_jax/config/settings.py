"""The settings of an experiment: frozen dataclasses, each number with the range that it may have.

The comments beside the fields are the reference of all settings; docs/settings.md is made of them.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict, WrapValidator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from selm_jax.shell.paths import PathError, place
from selm_jax.shell.ranges import (
    MOST,
    Axis,
    Count,
    Natural,
    NonNegative,
    Positive,
    Range,
    Seed,
    Share,
)
from selm_jax.shell.user_code import is_user_code

_STRICT = ConfigDict(extra="forbid")

# Names of what is built in, by setting: the one place that lists them.
RuleName = Literal["best_worst", "swap", "top_random"]
ExploreName = Literal["greedy", "sample", "all", "random", "best", "worst"]
Ties = Literal["drop", "first"]
CutOff = Literal["keep", "drop"]

Flag = Annotated[bool, Strict()]  # 1 and "yes" are none


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _day(value: Any) -> datetime.date:
    try:
        return value if isinstance(value, datetime.date) else datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise PydanticCustomError("day", "a day such as 2024-07-26 was expected") from None


def _folder(text: str) -> str:
    """A folder as a person writes it. What does not begin in their home folder stays word for word."""
    try:
        path = place(text)
    except PathError as e:
        raise PydanticCustomError("path", "{problem}", {"problem": str(e)}) from None
    return str(path) if text.startswith("~") else text


def _or_yours(value: Any, built_in: Callable[[Any], Any]) -> Any:
    return value if isinstance(value, str) and is_user_code(value) else built_in(value)


OrYours = WrapValidator(_or_yours)  # a name of what is built in, or package.module:function
Day = Annotated[datetime.date, BeforeValidator(_day)]
All = Annotated[int, Range(1, MOST, whole=True, advice="null takes all")]  # a limit
Size = Annotated[int, Range(1, 2**20, whole=True)]  # of arrays, along one axis
Rate = Annotated[float, Range(0, 1, above=True)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(_several)]  # one serves all iterations
Decay = Annotated[float, Range(0, 1, below=True)]  # of a mean over updates
# Choices that other modules offer, too: their tables and checks are held to these by a test.
OnBadRow = Literal["error", "drop"]
DuplicateIds = Literal["error", "number"]
Engine = Literal["vllm", "sglang"]
LabelKind = Literal["scores", "bradley_terry"]
ModelBased = Literal["reward_gap", "entropy"]
Acquisition = Literal["random", ModelBased]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw", "adafactor", "rmsprop"]
Remat = Literal["none", "mlp", "dots", "full"]
Quantization = Literal["int8", "nf4"]
ParameterDtype = Literal["float32", "bfloat16"]
Dtype = Literal["auto", ParameterDtype]
Preset = Literal["single", "fsdp", "fsdp_tensor"]
_GREEDY = "for the likeliest answer alone set candidates.greedy: 1 and candidates.samples: 0"


@dataclass(frozen=True, config=_STRICT)
class Model:
    source: str  # local Hugging Face folder, Hub id, or GGUF file
    revision: str | None = None  # of a Hub id; what it resolved to is recorded


@dataclass(frozen=True, config=_STRICT)
class Data:
    train: str  # .jsonl, .json, .csv, .tsv, .parquet, .arrow, a folder, or a Hub data set
    heldout: str | None = None  # prompts for evaluation; null evaluates nothing
    train_split: str | None = None  # of a Hub data set
    heldout_split: str | None = None
    train_config: str | None = None  # configuration of a Hub data set, where it has several
    heldout_config: str | None = None
    revision: str | None = None
    prompt: str = "prompt"  # column: text, or a list of messages
    prompt_id: str = "prompt_id"  # column; where it is absent ids are digests of the prompts
    chosen: str | None = None  # columns of a preference data set (UltraFeedback: chosen, rejected)
    rejected: str | None = None
    chosen_score: str | None = None  # column of numbers: what the answer is worth. For `margin` of
    # bradley_terry
    rejected_score: str | None = None  # likewise; 0 where the experiment names none
    system: str | None = None  # system message put before every prompt
    # Column of each row's own, if there is one and `system` is null; null: no column is read so.
    system_column: str | None = "system"
    portions: Count | None = None  # iteration t takes the t-th of so many parts; null: one each
    first_portion: Count = 1  # the first iteration's: 2 leaves out what a warm start was trained on
    skip: Natural = 0  # rows at the front that no portion is cut from
    shuffle: Flag = False  # before cutting the portions; the paper does not
    limit: All | None = None  # prompts per iteration at most
    heldout_limit: All | None = None
    on_bad_row: OnBadRow = "error"  # also of answers that spell out
    # an end token, and of prompts of more than rollout.max_prompt_tokens
    duplicate_ids: DuplicateIds = "error"  # number: the second p is p#2


@dataclass(frozen=True, config=_STRICT)
class Text:
    layout: Literal["default", "paper"] = "default"  # paper: as the authors' code, to compare with
    max_length: Size = 1024  # of prompt + response; `layout: paper` alone cuts texts
    max_prompt_length: Size = 512  # what a prompt is cut to where both together are too long
    template: dict[str, Any] = field(default_factory=dict)  # variables: {enable_thinking: false}
    date: Day = datetime.date(2024, 7, 26)  # "today" for templates that write the day;
    # with the real one a run that is resumed tomorrow would have other prompts
    # Control tokens that a message spells out, as `<|im_end|>`: tokens, as elsewhere, or its letters.
    special_tokens: Literal["as_tokens", "as_text"] = "as_tokens"


@dataclass(frozen=True, config=_STRICT)
class Candidates:
    greedy: Annotated[int, Range(0, 1, whole=True)] = (
        1  # 1: the policy's likeliest answer competes (the paper's y_ref)
    )
    samples: Annotated[int, Range(0, 4096, whole=True)] = 0  # answers drawn from the policy
    dataset: Flag = True  # the data set's chosen and rejected compete too (the paper)


@dataclass(frozen=True, config=_STRICT)
class Remote:
    """A server that answers in place of this program's own engine; see docs/run.md."""

    engine: Engine
    url: str = "http://127.0.0.1:8000"
    command: str | None = None  # starts it; {model} is the policy's folder. null: others do
    start_seconds: Positive = 1800.0  # to wait until it serves that folder
    concurrency: Count = 256  # answers asked for at once
    timeout: Positive = 600.0  # seconds for one answer
    retries: Natural = 6
    key_env: str | None = None  # environment variable that holds its API key


@dataclass(frozen=True, config=_STRICT)
class Rollout:
    max_new_tokens: Size = 1024
    # Of samples; greedy answers draw nothing.
    temperature: Annotated[float, Range(1e-3, advice=_GREEDY)] = 1.0
    top_k: Annotated[int, Range(0, MOST, whole=True, advice="0 keeps all tokens")] = 0
    top_p: Annotated[float, Range(0, 1, above=True, advice="1 keeps all tokens")] = 1.0
    min_p: Annotated[float, Range(0, 1, advice="0 keeps all tokens")] = 0.0
    slots: Size = 16  # responses decoded together, or the next number that the devices divide
    prefill_rows: Size = 8  # prompts in one prefill; likewise
    max_prompt_tokens: Size = 512  # a longer prompt is an error
    prompts_per_part: Count = 256  # a killed run loses at most one part of the responses
    remote: Remote | None = None  # a vLLM or SGLang server that answers; null: this program does


@dataclass(frozen=True, config=_STRICT)
class Labels:
    kind: LabelKind = "scores"  # bradley_terry: drawn, by the scores' gap
    temperature: Positive = 1.0  # of bradley_terry, in the unit of the scores
    flip: Annotated[float, Range(0, 0.5)] = (
        0.0  # how often a label is the wrong way round, from 0 to 0.5
    )


@dataclass(frozen=True, config=_STRICT)
class Feedback:
    ranker: str = "sentiment"  # a name of selm_jax.feedback, or package.module:function
    settings: dict[str, Any] = field(default_factory=dict)  # of the ranker
    # Which answers become chosen and rejected; or a function of yours, package.module:function.
    rule: Annotated[RuleName, OrYours] = "best_worst"
    # Which is y_ref; all: the optimism term is the mean over all of the policy's own answers. Or a
    # function of yours, package.module:function.
    explore: Annotated[ExploreName, OrYours] = "greedy"
    ties: Ties = "drop"  # first: as the authors' code
    cut_off: CutOff = "keep"  # pairs with an answer cut at max_new_tokens
    min_margin: NonNegative = 0.0  # drop pairs whose scores differ by less
    labels: Labels = Labels()  # for studies: how the pair's label comes from the scores
    budget: All | None = None  # prompts per iteration that the ranker is asked about; null: all
    acquisition: Acquisition = "random"  # which, under a budget
    prompts_per_part: Count = (
        4096  # ranked between two looks at whether to stop; a killed run loses
    )
    # at most one part of the scores. Few are slow: a reward model reads its weights for each part


@dataclass(frozen=True, config=_STRICT)
class Training:
    learning_rate: Rates  # peak, per iteration; one number serves all
    global_batch: Size  # examples per update, exactly
    epochs: Count = 1  # over an iteration's examples
    row_length: Size = 1024  # tokens of a packed row
    rows: Size = 4  # packed rows in one forward and backward pass, on all devices together
    schedule: Schedule = "cosine"
    warmup_ratio: Share = 0.1
    optimizer: Optimizer = "adamw"
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Range(0, 1)] = 0.0
    # Global norm of the gradient, at most; null: as it is.
    clip: Annotated[float, Range(0, above=True, advice="null switches clipping off")] | None = 1.0
    reference: Literal["stored", "live"] = "stored"  # live: a second model in memory, same numbers
    # Whose log-probabilities these are: of the policy that each iteration starts from (the paper),
    # or of the run's start model throughout. Answers are the current policy's in both.
    reference_policy: Literal["previous", "start"] = "previous"
    remat: Remat = "full"
    logprob_chunk: Size = 32  # tokens per row whose logits exist at a time
    checkpoint_every: Count = 100  # updates
    checkpoints_kept: Count = 1  # of an iteration that trains; the newest
    parameter_dtype: ParameterDtype = "float32"


@dataclass(frozen=True, config=_STRICT)
class Lora:
    rank: Size
    alpha: Positive
    dropout: Annotated[float, Range(0, 1, below=True, advice="it is a share")] = 0.0
    targets: str = "_proj$"  # regular expression over names such as self_attn.q_proj
    rslora: Flag = False  # scale alpha / sqrt(rank), not alpha / rank
    base: Literal["full", Quantization] = "full"  # int8, nf4: QLoRA, the base in 8 or 4 bits


@dataclass(frozen=True, config=_STRICT)
class Compute:
    dtype: Dtype = "auto"  # auto: float32 on CPU, else bfloat16
    preset: Preset = "fsdp_tensor"  # single: one device
    data: Axis = 1  # mesh axes within a slice; -1 takes the devices that are left
    fsdp: Axis = -1
    tensor: Axis = 1
    dcn_data: Axis = -1  # between slices (on GPUs: hosts); -1 takes those that are left
    dcn_fsdp: Count = 1
    decode_tensor: Count | None = (
        None  # devices of a copy of the model that generates; null: tensor
    )


@dataclass(frozen=True, config=_STRICT)
class Evaluation:
    samples: Annotated[int, Range(1, 4096, whole=True)] = (
        1  # answers drawn per held-out prompt, for reward and KL at temperature 1
    )


@dataclass(frozen=True, config=_STRICT)
class Log:
    tensorboard: Flag = True
    wandb: str | None = None  # project; needs the extra `wandb` and a login


@dataclass(frozen=True, config=_STRICT)
class Experiment:
    output: Annotated[str, AfterValidator(_folder)]  # the run folder
    iterations: Count
    model: Model
    data: Data
    objective: dict[str, Any]  # loss: a name or package.module:function; the rest are its settings
    training: Training
    lora: Lora | None = None  # trains adapters; null trains all parameters
    text: Text = Text()
    candidates: Candidates = Candidates()
    rollout: Rollout = Rollout()
    feedback: Feedback = Feedback()
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()
    seed: Seed = 42

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


def groups(root: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The groups of settings by their dotted keys, as the type hints have them; first `root` as ""."""
    yield path, root
    for name, hint in get_type_hints(root).items():
        for each in (hint, *get_args(hint)):  # a group, or one that may be absent
            if isinstance(each, type) and dataclasses.is_dataclass(each):
                yield from groups(each, f"{path}.{name}" if path else name)
