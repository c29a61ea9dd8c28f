"""The settings of an experiment, as frozen dataclasses that declare the values of each field.

The comments beside the fields are the settings reference, from which docs/settings.md is generated.
The groups under `rollout` are in `rollout.py`. A rule about several settings of one group is a
method of that group, decorated with `agree`; rules about several groups are in `consistency.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from selm_jax.config.evaluation import Evaluation
from selm_jax.config.heldout import HeldoutSets
from selm_jax.config.kinds import (
    Acquisition,
    All,
    AttentionBackEnd,
    AutoRemat,
    AutoSize,
    CutOff,
    Day,
    Decay,
    Dtype,
    DuplicateIds,
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
    RuleName,
    Schedule,
    Size,
    Ties,
    agree,
    fixed_length,
)
from selm_jax.config.rollout import Rollout
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

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Model:
    # The start model: a Hugging Face folder, also in a bucket (gs://, s3://), a Hub id, or a GGUF
    # file.
    source: str
    revision: str | None = None  # Branch, tag or commit of a Hub id; the run records the commit.
    # If the start model also reads images: whether exported models keep the parts for images, byte
    # for byte, or are the text model alone. Training and answers only use the text model.
    keep_vision: Flag = True


@dataclass(frozen=True, config=_STRICT)
class Data:
    # Training data: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a folder, or a Hub id.
    train: str
    # Prompts for evaluation, in the same forms as `train`; null switches evaluation off.
    heldout: str | None = None
    train_split: str | None = None  # Split of `train`, if it has several.
    heldout_split: str | None = None  # Split of `heldout`, if it has several.
    train_config: str | None = None  # Configuration of `train` on the Hub, if it has several.
    heldout_config: str | None = None  # Configuration of `heldout` on the Hub, if it has several.
    revision: str | None = None  # Branch, tag or commit of the Hub data sets.
    prompt: str = "prompt"  # Column of the prompt, which is text or a list of messages.
    # Column of the prompt's id; if the data has no such column, ids are digests of the prompts.
    prompt_id: str = "prompt_id"
    chosen: str | None = None  # Column of the preferred answer, such as UltraFeedback's `chosen`.
    rejected: str | None = None  # Column of the other answer.
    # Column of the chosen answer's score, which the `margin` of bradley_terry reads.
    chosen_score: str | None = None
    rejected_score: str | None = None  # Column of the rejected answer's score; null means 0.
    # Column of the prompt's count bonus, a number of at least 0, which `copo` reads in place of its
    # own counts: larger where answers of the kind are rarer.
    bonus: str | None = None
    system: str | None = None  # System message to put before every prompt.
    # Column of each row's own system message; it is used if the data has it and `system` is null.
    system_column: str | None = "system"
    # Number of portions of the rows, of which iteration t uses the t-th; null: one per iteration.
    portions: Count | None = None
    first_portion: Count = 1  # The portion for iteration 1; 2 skips what a warm start has seen.
    skip: Natural = 0  # Number of rows at the start of the data that are not used.
    shuffle: Flag = False  # Whether to shuffle the rows before splitting them; the paper does not.
    limit: All | None = None  # Maximum number of prompts per iteration; null uses all.
    heldout_limit: All | None = None  # Maximum number of held-out prompts; null uses all.
    # Further held-out sets by name, such as {safety: safety.jsonl}: a source, or {source, split,
    # config, limit}. Their metrics are heldout/NAME/... Without a limit, heldout_limit holds.
    heldout_sets: HeldoutSets = field(default_factory=dict)
    # What to do with an unusable row, with an answer that contains an end token, and with a prompt
    # longer than rollout.max_prompt_tokens: stop with an error, or drop it and count it.
    on_bad_row: OnBadRow = "error"
    # What to do with a repeated id: stop with an error, or treat the row as another pair for the
    # same prompt, with the id p#2.
    duplicate_ids: DuplicateIds = "error"

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.system is not None and self.system_column not in (None, "system"):
            yield (
                f"system_column: {self.system_column} gives each row its own system message, but "
                "data.system sets one for all rows; set only one of them"
            )
        if self.heldout_sets and self.heldout is None:
            yield "heldout_sets: they are evaluated besides data.heldout, so set that as well"
        if self.rejected_score and not self.chosen_score:
            yield "rejected_score: it needs data.chosen_score as well; set both or neither"


@dataclass(frozen=True, config=_STRICT)
class Text:
    # How texts become tokens; `paper` follows the authors' code, for comparisons.
    layout: Literal["default", "paper"] = "default"
    # Maximum number of tokens of prompt and response together; only `layout: paper` uses it.
    max_length: Size = 1024
    # Number of tokens to which `layout: paper` cuts a prompt if the two are too long together.
    max_prompt_length: Size = 512
    # Variables of the chat template, such as {enable_thinking: false}.
    template: Free = field(default_factory=dict)
    # The date that templates write as today's. It is fixed because, with the real date, a run that
    # is resumed the next day would have different prompts.
    date: Day = datetime.date(2024, 7, 26)
    # Whether a control token written in a message, such as `<|im_end|>`, becomes that token, as in
    # other programs, or is tokenized as ordinary text.
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
    # Number of greedy answers among the candidates, 0 or 1; this answer is the paper's y_ref.
    greedy: Annotated[int, Range(0, 1, whole=True)] = 1
    samples: Annotated[int, Range(0, 4096, whole=True)] = 0  # Sampled answers per prompt.
    dataset: Flag = True  # Whether the data set's two answers are candidates too, as in the paper.


@dataclass(frozen=True, config=_STRICT)
class Labels:
    # Whether the higher score always wins (`scores`), or the winner is drawn at random, with a
    # probability that depends on the difference between the scores (`bradley_terry`).
    kind: LabelKind = "scores"
    temperature: Positive = 1.0  # Temperature of `bradley_terry`, in the unit of the scores.
    flip: Annotated[float, Range(0, 0.5)] = 0.0  # Probability that a label is flipped.


@dataclass(frozen=True, config=_STRICT)
class Feedback:
    # The ranker: a built-in name (docs/feedback.md), or your own package.module:function.
    ranker: str = "sentiment"
    settings: Free = field(default_factory=dict)  # Settings of the ranker.
    # Which answers become chosen and rejected: a built-in rule or your package.module:function.
    rule: Annotated[RuleName, OrYours] = "best_worst"
    # Which answer is the explored one, y_ref. `all` takes the mean of their log-probabilities over
    # the policy's own answers. Your own package.module:function works too.
    explore: Annotated[ExploreName, OrYours] = "greedy"
    # What to do with a prompt whose best and worst scores are equal: `drop` it, or let its `first`
    # answer be both chosen and rejected, as in the authors' code.
    ties: Ties = "drop"
    # Whether to keep or drop pairs with an answer that was cut off at rollout.max_new_tokens.
    cut_off: CutOff = "keep"
    min_margin: NonNegative = 0.0  # Pairs whose scores differ by less than this are dropped.
    labels: Labels = Labels()  # How a pair's label follows from the scores, for simulations.
    budget: All | None = None  # Maximum number of prompts per iteration to rank; null ranks all.
    acquisition: Acquisition = "random"  # How those prompts are selected if there is a budget.
    # Number of prompts whose scores are saved together; a killed run loses at most one such part.
    # Small parts are slow, because a reward model reloads its weights for each part.
    prompts_per_part: Count = 4096

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.budget is None and self.acquisition != "random":
            yield f"acquisition: {self.acquisition}; it has no effect without feedback.budget"


@dataclass(frozen=True, config=_STRICT)
class Importance:
    """Weights for answers that another policy or engine gave; see docs/methods.md."""

    # The ratio of the scorer's probability to the sampler's, of each token or of a pair's answers
    # (sequence): truncated at `cap`, or masked, which drops what is above `cap` or below `floor`.
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
    cap: Annotated[float, Range(1)] = 3.0  # The largest ratio.
    floor: Share = 0.0  # The smallest ratio; only the modes that mask read it.

    @agree
    def _agrees(self) -> Iterator[str]:
        if self.floor and not self.mode.endswith("mask"):
            yield f"floor: {self.floor:g}; only token_mask and sequence_mask read it"


@dataclass(frozen=True, config=_STRICT)
class Training:
    learning_rate: Rates  # Peak learning rate: one for all iterations, or a list with one for each.
    global_batch: Size  # Number of examples in each update.
    epochs: Count = 1  # Number of passes over an iteration's examples.
    # Number of tokens in a packed row; `auto` takes what pads an iteration least (docs/memory.md).
    row_length: AutoSize = "auto"
    # Number of packed rows of a batch, over all devices; the most, if `row_length` is `auto`. Here
    # and below, `auto` takes what the devices' memory allows (docs/memory.md).
    rows: AutoSize = "auto"
    schedule: Schedule = "cosine"  # How the learning rate decays; it restarts in every iteration.
    warmup_ratio: Share = 0.1  # Fraction of an iteration's updates in which the rate warms up.
    optimizer: Optimizer = "adamw"  # The optimizer; every iteration starts with a new state.
    b1: Decay = 0.9  # Decay rate of the moving average of gradients.
    b2: Decay = 0.999  # Decay rate of the moving average of squared gradients.
    eps: Rate = 1e-8  # Added to the denominator, so that steps stay finite for tiny gradients.
    weight_decay: Annotated[float, Range(0, 1)] = 0.0  # Decoupled, times the learning rate.
    # Maximum global norm of the gradient; null switches clipping off.
    clip: Annotated[float, Range(0, above=True, advice="null switches clipping off")] | None = 1.0
    # Whether the routers of a mixture of experts are trained, or stay as they are (docs/models.md).
    router: Literal["frozen", "trained"] = "frozen"
    # Whether the reference log-probabilities are computed once and stored, or computed at every
    # update by a second model in memory. The numbers are the same.
    reference: Literal["stored", "live"] = "stored"
    # The reference policy: the one that each iteration starts from (as in the paper), or the run's
    # start model in all iterations. The current policy generates the answers in both cases.
    reference_policy: Literal["previous", "start"] = "previous"
    # How much the backward pass recomputes to save memory: from nothing (none) to all (full).
    remat: AutoRemat = "auto"
    # Number of tokens per row whose logits are in memory at a time. On accelerators it is raised
    # until each device has at least 512 tokens.
    logprob_chunk: AutoSize = "auto"
    checkpoint_every: Count = 100  # Number of updates between two checkpoints.
    checkpoints_kept: Count = 1  # Number of an iteration's newest checkpoints to keep.
    parameter_dtype: ParameterDtype = "float32"  # Data type of parameters and optimizer moments.
    # What to do if a loss or gradient is not finite: stop the run, or skip the update and count it.
    on_nonfinite: Literal["stop", "skip"] = "stop"
    # Whether every update reports the entropy of the scored tokens' distributions and the share of
    # tokens that are the likeliest (`entropy`, `mean_token_accuracy`).
    token_statistics: Flag = False
    # Importance weights of the tokens' gradients, for answers whose sampler is not exactly the
    # policy in training; null: every token counts the same.
    importance: Importance | None = None

    @agree
    def _agrees(self) -> Iterator[str]:
        rows = 1 if self.rows == "auto" else self.rows
        if (tokens := rows * (fixed_length(self.row_length) or 1)) > MOST:
            yield (
                f"rows: {rows:,} rows of training.row_length {self.row_length:,} are "
                f"{tokens:,} tokens at once; at most {MOST:,} were expected"
            )

    def peak(self, iteration: int) -> float:
        """The peak learning rate of an iteration, counted from 1."""
        rates = self.learning_rate
        return rates[0] if len(rates) == 1 else rates[iteration - 1]


@dataclass(frozen=True, config=_STRICT)
class Lora:
    rank: Size  # Inner dimension of an adapter.
    alpha: Positive  # Numerator of an adapter's scale, alpha / rank.
    # Fraction of an adapter's inputs that are set to 0 in training.
    dropout: Annotated[float, Range(0, 1, below=True, advice="it is a share")] = 0.0
    # Regular expression that selects the matrices to adapt, by names such as self_attn.q_proj.
    targets: str = "_proj$"
    # Whether every expert of a mixture has adapters of its own, where `targets` matches the MLP.
    experts: Flag = False
    rslora: Flag = False  # Whether the scale is alpha / sqrt(rank) instead (rsLoRA).
    # Precision of the base model: `full`, or 8 bits (`int8`) or 4 bits (`nf4`) for QLoRA.
    base: Literal["full", Quantization] = "full"


@dataclass(frozen=True, config=_STRICT)
class Compute:
    # Data type of activations and matrix products; `auto` is float32 on CPU and bfloat16 elsewhere.
    dtype: Dtype = "auto"
    # How arrays are sharded over the devices (docs/scale.md); `single` uses one device.
    preset: Preset = "fsdp_tensor"
    data: Axis = 1  # Number of model replicas within a slice; -1 uses all remaining devices.
    # Number of devices of a slice that parameters and rows are sharded over; -1: all remaining.
    fsdp: Axis = -1
    tensor: Axis = 1  # Number of devices of a slice that matrices are sharded over; -1 as above.
    dcn_data: Axis = -1  # Number of slices (GPU hosts) with replicas; -1 uses all remaining ones.
    dcn_fsdp: Count = 1  # Number of slices over which parameters are sharded.
    decode_tensor: Count | None = None  # The same as `tensor`, for generation; null: as `tensor`.
    # How attention is computed. `auto` chooses by platform and row length: `einsum` (all scores at
    # once) for short rows; for long ones (only the visible blocks) `kernel` on TPUs and `blocks`
    # elsewhere. `kernel` has been compiled for TPUs but has not run on one; `blocks` avoids it.
    attention: AttentionBackEnd = "auto"


@dataclass(frozen=True, config=_STRICT)
class Log:
    tensorboard: Flag = True  # Whether to write TensorBoard files into the run folder.
    wandb: str | None = None  # Weights & Biases project; needs the extra `wandb` and a login.
    # Whether a run ends by writing its page, report.html. `selm report` writes it at any time.
    report: Flag = True


@dataclass(frozen=True, config=_STRICT)
class Experiment:
    output: Folder  # The run folder.
    iterations: Count  # Number of rounds of generating answers, ranking them and training.
    model: Model
    data: Data
    # The key `loss` names a loss, a sum of losses, or your own package.module:function; the other
    # keys are its settings. `alpha` is one value for all iterations, or a list with one for each.
    objective: Loss
    training: Training
    lora: Lora | None = None  # Settings of LoRA adapters to train; null trains all parameters.
    text: Text = Text()
    candidates: Candidates = Candidates()
    rollout: Rollout = Rollout()
    feedback: Feedback = Feedback()
    compute: Compute = Compute()
    evaluation: Evaluation = Evaluation()
    log: Log = Log()
    # Which models stay on disk: those of all iterations, or only the last one. A model that the
    # next iteration still needs is deleted after that iteration.
    keep_models: KeptModels = "all"
    # Held-out metric of the best model, such as heldout/reward_greedy: manifest and page name this
    # model, and `keep_models: last` keeps it besides the last one (docs/evaluate.md).
    keep_best: str | None = None
    seed: Seed = 42  # Seed of all random numbers; the same seed gives the same run.

    def learning_rate(self, iteration: int) -> float:
        """The peak learning rate of an iteration, counted from 1."""
        return self.training.peak(iteration)

    @property
    def taught(self) -> bool:
        """Says whether training uses the data set's answers, with no generation or ranking.

        `data.chosen` alone gives single answers (loss: sft); with `data.rejected` they are pairs
        (offline DPO).
        """
        c = self.candidates
        return c.dataset and not c.greedy and not c.samples and self.data.chosen is not None

    @property
    def portions(self) -> int:
        return self.data.portions or self.data.first_portion - 1 + self.iterations


def groups(root: type, path: str = "") -> Iterator[tuple[str, type]]:
    """Yields (dotted key, class) of each group of settings in a class; `root` has the key ""."""
    yield path, root
    for name, hint in get_type_hints(root).items():
        if get_origin(hint) is dict:
            continue  # its keys are names that the user chooses
        for each in (hint, *get_args(hint)):  # a required group or an optional one
            if isinstance(each, type) and dataclasses.is_dataclass(each):
                yield from groups(each, f"{path}.{name}" if path else name)
