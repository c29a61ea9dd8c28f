"""The settings of an experiment: frozen dataclasses, each field with the values that it may have.

The comments beside the fields are the reference of all settings; docs/settings.md is made of them.
A rule about several settings of one group stands in the group, as a method that is made by `agree`;
rules about several groups are in `consistency.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Literal, get_args, get_type_hints

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from selm_jax.config.kinds import (
    Acquisition,
    All,
    AttentionBackEnd,
    Command,
    CutOff,
    Day,
    Decay,
    Dtype,
    DuplicateIds,
    Engine,
    ExploreName,
    Flag,
    Folder,
    Free,
    KeptModels,
    LabelKind,
    Loss,
    OnBadRow,
    Optimizer,
    OrYours,
    ParameterDtype,
    Preset,
    Quantization,
    Rate,
    Rates,
    Remat,
    RuleName,
    Schedule,
    Size,
    Ties,
    Yours,
    agree,
)
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
    ranges_of,
)

_STRICT = ConfigDict(extra="forbid")
_GREEDY = "for the likeliest answer alone set candidates.greedy: 1 and candidates.samples: 0"


@dataclass(frozen=True, config=_STRICT)
class Model:
    source: str  # The start model: a Hugging Face folder, a Hub id, or a GGUF file.
    revision: str | None = None  # Branch, tag or commit of a Hub id; the commit is recorded.


@dataclass(frozen=True, config=_STRICT)
class Data:
    # What is trained on: .jsonl, .json, .csv, .tsv, .parquet, .arrow, a folder, or a Hub data set.
    train: str
    heldout: str | None = None  # Prompts for evaluation, as `train`; null evaluates nothing.
    train_split: str | None = None  # Split of `train`, if it has several.
    heldout_split: str | None = None  # Split of `heldout`, if it has several.
    train_config: str | None = None  # Configuration of `train` on the Hub, if it has several.
    heldout_config: str | None = None  # Configuration of `heldout` on the Hub, if it has several.
    revision: str | None = None  # Branch, tag or commit of the Hub data sets.
    prompt: str = "prompt"  # Column of the prompt: text, or a list of messages.
    prompt_id: str = "prompt_id"  # Column of the prompt's id; without it, ids are digests.
    chosen: str | None = None  # Column of the preferred answer, such as UltraFeedback's `chosen`.
    rejected: str | None = None  # Column of the other answer.
    # Column of the chosen answer's score, which the `margin` of bradley_terry reads.
    chosen_score: str | None = None
    rejected_score: str | None = None  # Column of the rejected answer's score; null means 0.
    system: str | None = None  # A system message that is put before every prompt.
    # Column of each row's own system message; it is read if the data has it and `system` is null.
    system_column: str | None = "system"
    # Number of parts into which the rows are cut; iteration t takes part t. null: one per iteration.
    portions: Count | None = None
    first_portion: Count = 1  # The part that iteration 1 takes; 2 skips what a warm start has seen.
    skip: Natural = 0  # Number of rows at the front that belong to no part.
    shuffle: Flag = False  # Whether rows are shuffled before they are cut; the paper does not.
    limit: All | None = None  # Most prompts of an iteration; null takes all.
    heldout_limit: All | None = None  # Most held-out prompts; null takes all.
    # What becomes of a row that cannot be used, of an answer that spells out an end token, and of a
    # prompt of more than rollout.max_prompt_tokens: an error, or it is left out and counted.
    on_bad_row: OnBadRow = "error"
    # What a repeated id means: an error, or one more pair of the same prompt, with the id p#2.
    duplicate_ids: DuplicateIds = "error"

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.system is not None and self.system_column not in (None, "system"):
            yield (
                f"system_column: {self.system_column} is to hold each row's system message, and "
                "data.system is one for all; set one of them"
            )
        if self.rejected_score and not self.chosen_score:
            yield "rejected_score: there is no data.chosen_score to compare it with"


@dataclass(frozen=True, config=_STRICT)
class Text:
    # How texts become tokens; `paper` follows the authors' code, for comparisons.
    layout: Literal["default", "paper"] = "default"
    max_length: Size = 1024  # Tokens of prompt and response; only `layout: paper` cuts them to it.
    max_prompt_length: Size = 512  # What a prompt is cut to where both together are too long.
    # Variables of the chat template, such as {enable_thinking: false}.
    template: Free = field(default_factory=dict)
    # The day that templates write as today's. With the real one, a run that is resumed tomorrow would
    # have other prompts.
    date: Day = datetime.date(2024, 7, 26)
    # Whether a control token that a message spells out, as `<|im_end|>`, becomes that token, as
    # elsewhere, or its letters.
    special_tokens: Literal["as_tokens", "as_text"] = "as_tokens"

    @agree
    def _agrees(self) -> Iterator[str]:
        for key in ("max_length", "max_prompt_length"):
            if self.layout != "paper" and getattr(self, key) != getattr(Text, key):
                yield f"{key}: only text.layout: paper reads it; the default layout cuts nothing"
        if self.max_prompt_length >= self.max_length:
            yield (
                f"max_prompt_length: {self.max_prompt_length}; less than text.max_length "
                f"({self.max_length}) was expected, or no response would be left"
            )


@dataclass(frozen=True, config=_STRICT)
class Candidates:
    # Whether (1) the policy's likeliest answer competes, the paper's y_ref.
    greedy: Annotated[int, Range(0, 1, whole=True)] = 1
    samples: Annotated[int, Range(0, 4096, whole=True)] = 0  # Answers drawn from the policy.
    dataset: Flag = True  # Whether the data set's two answers compete, too, as in the paper.


@dataclass(frozen=True, config=_STRICT)
class Remote:
    """A server that answers in place of this program's own engine; see docs/run.md."""

    engine: Engine  # What the server runs.
    url: str = "http://127.0.0.1:8000"  # Where it answers.
    # Starts it; {model} stands for the policy's folder. null: somebody else starts it.
    command: Command | None = None
    start_seconds: Positive = 1800.0  # How long to wait until it serves that folder.
    concurrency: Count = 256  # Answers that are asked for at once.
    timeout: Positive = 600.0  # Seconds for one answer.
    retries: Natural = 6  # How often a failed request is sent again.
    key_env: str | None = None  # Environment variable that holds its API key.


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of samples are drawn; greedy answers draw nothing.

    Raises:
        ValueError: a number out of its range.
    """

    # Flattens (above 1) or sharpens the distribution that samples are drawn from.
    temperature: Annotated[float, Range(1e-3, advice=_GREEDY)] = 1.0
    # Draws among the likeliest so many tokens; 0: among all.
    top_k: Annotated[int, Range(0, MOST, whole=True, advice="0 keeps all tokens")] = 0
    # Draws among the likeliest tokens that have this probability together.
    top_p: Annotated[float, Range(0, 1, above=True, advice="1 keeps all tokens")] = 1.0
    # Draws among tokens of at least this share of the likeliest one's probability.
    min_p: Annotated[float, Range(0, 1, advice="0 keeps all tokens")] = 0.0

    def __post_init__(self):
        for name, declared in ranges_of(SamplingSettings).items():
            value = getattr(self, name)
            if (expected := declared.problem(value)) is not None:
                raise ValueError(f"{name} is {value}; expected {expected}")


@dataclass(frozen=True, config=_STRICT)
class Rollout(SamplingSettings):
    # A function of yours, package.module:function, on the logits that samples are drawn from.
    filter: Yours | None = None
    max_new_tokens: Size = 1024  # Most tokens of an answer; a longer one is cut off.
    slots: Size = 16  # Answers decoded together, or the next number that the devices divide.
    prefill_rows: Size = 8  # Prompts read together, or the next number that the devices divide.
    max_prompt_tokens: Size = 512  # A prompt of more tokens is a bad row.
    prompts_per_part: Count = 256  # A killed run loses one such part of the answers at most.
    remote: Remote | None = None  # A vLLM or SGLang server that answers; null: this program does.

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.remote is not None and self.filter is not None:
            yield (
                f"filter: {self.filter}; the server of rollout.remote draws the tokens and cannot run "
                "a function of yours. Remove one of the two"
            )


@dataclass(frozen=True, config=_STRICT)
class Labels:
    # Whether the higher score always wins, or a label is drawn by the gap of the scores.
    kind: LabelKind = "scores"
    temperature: Positive = 1.0  # Temperature of `bradley_terry`, in the unit of the scores.
    flip: Annotated[float, Range(0, 0.5)] = 0.0  # Probability that a label is swapped.


@dataclass(frozen=True, config=_STRICT)
class Feedback:
    ranker: str = (
        "sentiment"  # Who ranks: a built-in name (docs/feedback.md) or package.module:function.
    )
    settings: Free = field(default_factory=dict)  # Settings of the ranker.
    # Which answers become chosen and rejected; or a function of yours, package.module:function.
    rule: Annotated[RuleName, OrYours] = "best_worst"
    # Which is y_ref; all: the optimism term is the mean over all of the policy's own answers. Or a
    # function of yours, package.module:function.
    explore: Annotated[ExploreName, OrYours] = "greedy"
    # What becomes of a prompt whose best and worst scores are equal; first: as the authors' code.
    ties: Ties = "drop"
    cut_off: CutOff = "keep"  # What becomes of pairs with an answer cut at max_new_tokens.
    min_margin: NonNegative = 0.0  # Pairs whose scores differ by less are dropped.
    labels: Labels = Labels()  # For studies: how the pair's label comes from the scores.
    budget: All | None = None  # Prompts of an iteration that the ranker is asked about; null: all.
    acquisition: Acquisition = "random"  # Which prompts are asked about, under a budget.
    # Prompts ranked between two looks at whether to stop; a killed run loses one such part at most.
    # Small parts are slow: a reward model reads its weights for each.
    prompts_per_part: Count = 4096

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.budget is None and self.acquisition != "random":
            yield f"acquisition: {self.acquisition}; only a feedback.budget has a use for it"


@dataclass(frozen=True, config=_STRICT)
class Training:
    learning_rate: Rates  # The peak, of each iteration; one number serves all.
    global_batch: Size  # Number of examples in each update.
    epochs: Count = 1  # Number of passes over an iteration's examples.
    row_length: Size = 1024  # Tokens of a packed row.
    rows: Size = 4  # Packed rows in one forward and backward pass, on all devices together.
    schedule: Schedule = "cosine"  # How the learning rate falls; fresh in each iteration.
    warmup_ratio: Share = 0.1  # Share of an iteration's updates in which the rate rises.
    optimizer: Optimizer = "adamw"  # Which optimiser; fresh in each iteration.
    b1: Decay = 0.9  # Decay of the mean of gradients.
    b2: Decay = 0.999  # Decay of the mean of squared gradients.
    eps: Rate = 1e-8  # Keeps the step finite where squared gradients are near 0.
    weight_decay: Annotated[float, Range(0, 1)] = 0.0  # Decoupled, times the learning rate.
    # Largest global norm of the gradient; null does not clip.
    clip: Annotated[float, Range(0, above=True, advice="null switches clipping off")] | None = 1.0
    # Whether the reference's log-probabilities are computed once and stored, or by a second model in
    # memory. The numbers are the same.
    reference: Literal["stored", "live"] = "stored"
    # Whose log-probabilities these are: of the policy that each iteration starts from (the paper),
    # or of the run's start model throughout. Answers are the current policy's in both.
    reference_policy: Literal["previous", "start"] = "previous"
    # What the backward pass computes again: nothing (none) to everything (full), for memory.
    remat: Remat = "full"
    # Tokens per row whose logits exist at a time; on accelerators at least as many as make 512 tokens
    # of a device.
    logprob_chunk: Size = 32
    checkpoint_every: Count = 100  # Updates between two checkpoints.
    checkpoints_kept: Count = 1  # How many of an iteration's newest checkpoints are kept.
    parameter_dtype: ParameterDtype = "float32"  # What parameters and moments are kept in.

    @agree
    def _agrees(self) -> Iterator[str]:
        tokens = self.rows * self.row_length
        if tokens > MOST:
            yield (
                f"rows: {self.rows:,} rows of training.row_length {self.row_length:,} are {tokens:,} "
                f"tokens at once; at most {MOST:,} were expected"
            )

    def peak(self, iteration: int) -> float:
        """The learning rate at the peak of iteration 1, 2, ..."""
        rates = self.learning_rate
        return rates[0] if len(rates) == 1 else rates[iteration - 1]


@dataclass(frozen=True, config=_STRICT)
class Lora:
    rank: Size  # Inner dimension of an adapter.
    alpha: Positive  # Numerator of an adapter's scale, alpha / rank.
    # Share of an adapter's inputs that are set to 0 in training.
    dropout: Annotated[float, Range(0, 1, below=True, advice="it is a share")] = 0.0
    targets: str = "_proj$"  # Regular expression, searched for in names such as self_attn.q_proj.
    rslora: Flag = False  # Whether the scale is alpha / sqrt(rank).
    base: Literal["full", Quantization] = "full"  # int8, nf4: QLoRA, the base in 8 or 4 bits.


@dataclass(frozen=True, config=_STRICT)
class Compute:
    dtype: Dtype = "auto"  # What is computed in; auto: float32 on CPU, else bfloat16.
    preset: Preset = "fsdp_tensor"  # How arrays lie on the devices (docs/scale.md); single: on one.
    data: Axis = 1  # Devices of a slice that hold copies; -1 takes those that are left.
    fsdp: Axis = -1  # Devices of a slice that share parameters and rows; -1 as above.
    tensor: Axis = 1  # Devices of a slice that share each matrix; -1 as above.
    dcn_data: Axis = -1  # Slices (on GPUs: hosts) that hold copies; -1 takes those that are left.
    dcn_fsdp: Count = 1  # Slices that share parameters.
    # Devices that share a copy of the model to generate; null: as many as `tensor`.
    decode_tensor: Count | None = None
    # How attention is computed. `auto` chooses einsum (all scores at once) or blocks (only the blocks
    # that are seen) by platform and row length. `kernel` does the same as blocks in a TPU kernel; it
    # has been compiled for TPUs but has not run on one.
    attention: AttentionBackEnd = "auto"


@dataclass(frozen=True, config=_STRICT)
class Evaluation:
    # Answers drawn per held-out prompt, for reward and KL at temperature 1.
    samples: Annotated[int, Range(1, 4096, whole=True)] = 1


@dataclass(frozen=True, config=_STRICT)
class Log:
    tensorboard: Flag = True  # Whether metrics go to TensorBoard files in the run folder.
    wandb: str | None = None  # Project in Weights & Biases; needs the extra `wandb` and a login.


@dataclass(frozen=True, config=_STRICT)
class Experiment:
    output: Folder  # The run folder.
    iterations: Count  # Number of times that answers are generated, ranked and trained on.
    model: Model
    data: Data
    # The key `loss` is a name, a sum of names, or package.module:function; the others are its settings.
    objective: Loss
    training: Training
    lora: Lora | None = None  # Trains adapters; null trains all parameters.
    text: Text = Text()
    candidates: Candidates = Candidates()
    rollout: Rollout = Rollout()
    feedback: Feedback = Feedback()
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()
    # Which models stay on disk: those of all iterations, or the last one. A model that the next
    # iteration still needs is deleted after that iteration.
    keep_models: KeptModels = "all"
    seed: Seed = 42  # Seed of all random draws; the same seed gives the same run.

    def learning_rate(self, iteration: int) -> float:
        """The peak of iteration 1, 2, ..."""
        return self.training.peak(iteration)

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
