"""A model made ready to answer and to score, wherever it comes from.

    model = open_model("runs/quickstart")               the last model of a run; or a folder, a Hub
    answers = model.answer(conversations, ...)          id, a GGUF file
    logps = model.logprobs(examples)

An answer is a function of the parameters, the seed, its prompt and its number; a log-probability
of the parameters and its tokens. Batches, slots, meshes and what else is asked for do not enter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from selm_jax.config import Experiment, Text
from selm_jax.config import load as load_experiment
from selm_jax.config.kinds import Dtype
from selm_jax.evaluation import EvaluationError
from selm_jax.models.attention import tree_mask
from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Decoder, Params, abstract_params, stack, unembedding
from selm_jax.objectives.logprobs import TokenStats, token_statistics
from selm_jax.parallel.mesh import compute_dtype, decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import (
    PreferenceBatch,
    assign_rows,
    common_shape,
    pack,
    unpack_tokens,
)
from selm_jax.rollout.engine import Engine, bucket
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request, Response
from selm_jax.rollout.sampling import Sampling
from selm_jax.shell import artifacts
from selm_jax.shell.paths import place
from selm_jax.shell.progress import Advance, terminal
from selm_jax.text.chat import Chat, ChatError, Turn
from selm_jax.text.tokenizer import Tokenizer
from selm_jax.text.vocabulary import stop_ids
from selm_jax.weights import sources
from selm_jax.weights.huggingface import checked_config, load

Ids = tuple[int, ...]

_CHUNK = 32  # tokens per row whose logits exist at a time
_GROUP = 16  # batches that are packed together


@dataclass(frozen=True)
class Answer:
    """One answer. `token_ids` ends with the stop token if `finish` is "stop"; else it is "length"."""

    text: str
    token_ids: Ids
    finish: str


@dataclass(frozen=True)
class Found:
    """What a name on the command line stands for.

    Attributes:
      name: for tables and files: `RUN/iteration_3`, the folder's name, or the Hub id.
      source, revision: for `weights.sources.resolve`.
      run: the run's folder, if it is the model of a run, and `experiment` its settings.
    """

    name: str
    source: str
    revision: str | None = None
    run: Path | None = None
    experiment: Experiment | None = None


def find(source: str, *, revision: str | None = None, iteration: int | None = None) -> Found:
    """What a name stands for.

    Args:
      source: a run folder, a model folder, a Hub id or a GGUF file.
      revision: of a Hub id.
      iteration: of a run: its model after this iteration, 0 for its start; None: its last model.

    Raises:
      EvaluationError: a run without such a model, or an iteration of something else.
    """
    path = place(source)
    if not (path / "manifest.json").is_file() or (path / "config.json").is_file():
        if iteration is not None:
            raise EvaluationError(
                f"{source} is no run folder (no manifest.json there): it has no iteration "
                f"{iteration}. Leave the iteration out"
            )
        if path.name == "model" and path.parent.name.startswith("iteration_"):
            return Found(f"{path.parent.parent.name}/{path.parent.name}", source)
        return Found(path.name if path.exists() else source, source, revision)
    experiment = load_experiment(path / "config.yaml")
    there = [0, *_exported(path)]
    t = there[-1] if iteration is None else iteration
    if t not in there or there == [0] and iteration is None:
        raise EvaluationError(
            f"{source}: no model of iteration {1 if iteration is None else t}; finished are "
            f"{', '.join(map(str, there))} (0 is the start model). `selm run` goes on from there"
        )
    if t == 0:
        model = experiment.model
        return Found(f"{path.name}/start", model.source, model.revision, path, experiment)
    model = path / f"iteration_{t}" / "model"
    return Found(f"{path.name}/iteration_{t}", str(model), None, path, experiment)


def _exported(run: Path) -> list[int]:
    """The iterations of a run whose model is whole, in order."""
    return [
        t
        for t, folder in artifacts.iterations(run).items()
        if artifacts.Stages(folder).read().get("export", {}).get("done")
    ]


def open_model(
    source: str, *, revision: str | None = None, iteration: int | None = None, **how: Any
) -> Model:
    """The model that `find` finds; for `how` see `open_found`."""
    return open_found(find(source, revision=revision, iteration=iteration), **how)


def open_found(
    found: Found,
    *,
    text: Text | None = None,
    dtype: str = "auto",
    tensor: int = 1,
    slots: int = 16,
    console: Console | None = None,
) -> Model:
    """Makes a model ready. Its weights are read when they are first needed.

    Args:
      text: what the chat template reads besides the messages; None: as the run's settings say.
      dtype: of parameters and computation: auto (float32 on CPU, else bfloat16), float32, bfloat16.
      tensor: devices that share each matrix; the others share rows and parameters.
      slots: answers that are drawn together.

    Raises:
      EvaluationError: an unknown dtype.
      SourceError: there is no such model.
    """
    if dtype not in get_args(Dtype):
        raise EvaluationError(f"dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}")
    console = console or terminal(stderr=True)
    if text is None:
        text = found.experiment.text if found.experiment else Text()
    mesh = make_mesh((1, -1, tensor))
    return Model(
        found, sources.resolve(found.source, revision=found.revision, progress=console),
        text=text, mesh=mesh, dtype=compute_dtype(dtype, mesh.devices.flat[0].platform), slots=slots,
        console=console,
    )  # fmt: skip


class Model:
    """A model ready to answer and to score; `open_model` makes one.

    Attributes:
      name, found: see `find`.
      folder: its files, and `folder.origin`, which pins their bytes.
      facts: the decoder's.
      text: what the chat template reads besides the messages.
    """

    def __init__(
        self,
        found: Found,
        folder: sources.ModelFolder,
        *,
        text: Text,
        mesh: jax.sharding.Mesh,
        dtype: Any,
        slots: int,
        console: Console,
    ):
        self.found, self.name, self.folder, self.console = found, found.name, folder, console
        self.facts: DecoderConfig = checked_config(folder.path)
        self.mesh, self.dtype, self.slots = mesh, dtype, slots
        self.text = text
        self._params: Params | None = None
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._statistics = jax.jit(_statistics, static_argnums=0, out_shardings=everywhere)

    # Text

    @cached_property
    def chat(self) -> Chat:
        """Raises ChatError for a model without a chat template."""
        return Chat(self.folder.path, self.text, self.facts.vocab_size)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of any model, whether or not it has a chat template."""
        return Tokenizer(self.folder.path)

    @cached_property
    def stop_ids(self) -> Ids:
        return stop_ids(self.folder.path, self.tokenizer, self.facts.vocab_size)

    def prompt_ids(self, conversations: Sequence[Sequence[Turn]]) -> list[Ids]:
        """The conversations and the headers of the answers that are to follow.

        Raises:
          ChatError: the template refuses one; its place in the list (from 0) is named.
        """
        found = []
        for i, messages in enumerate(conversations):
            try:
                found.append(self.chat.prompt_ids(messages))
            except ChatError as e:
                raise ChatError(f"conversation {i}: {e}") from e
        return found

    # Answers

    def answer(
        self,
        conversations: Sequence[Sequence[Turn]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        progress: Advance = lambda answers, tokens=0: None,
        **filters: Any,
    ) -> list[list[Answer]]:
        """Answers to conversations that end with a user's turn: per conversation its samples.

        Args:
          temperature: 0 gives the likeliest token each time, and one sample.
          seed: with the conversation and the number of the sample it determines an answer. Two
            equal conversations so get equal answers.
          progress: called with answers finished and tokens drawn since the last call.
          filters: others of `Sampling`'s settings, such as `top_p`.

        Raises:
          ChatError, EvaluationError: a conversation that the template refuses, or that leaves no
            room for its answer.
        """
        greedy = temperature == 0
        if greedy and samples != 1:
            raise EvaluationError(f"temperature 0 gives one answer, {samples} samples were asked")
        sampling = Sampling() if greedy else Sampling(temperature, **filters)
        responses = self.generate(
            self.prompt_ids(conversations), greedy=int(greedy), samples=0 if greedy else samples,
            max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, progress=progress,
        )  # fmt: skip
        return [
            [Answer(self.chat.text(r.tokens), r.tokens, r.finish) for r in each]
            for each in responses
        ]

    def generate(
        self,
        prompts: Sequence[Ids],
        *,
        greedy: int,
        samples: int,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        progress: Advance = lambda answers, tokens=0: None,
        ended: Callable[[Ids], bool] | None = None,
        also_stop: Ids = (),
    ) -> list[list[Response]]:
        """The same for token ids: per prompt its greedy response (if `greedy` is 1), then samples.

        `ended` may end responses that no stop token ends; see `Engine.generate`. `also_stop` are
        stop tokens besides the model's own.
        """
        found: list[list[Response]] = [[] for _ in prompts]
        stops = tuple(sorted({*self.stop_ids, *also_stop}))
        for config, members in self._by_config([len(p) + max_new_tokens for p in prompts]):
            longest = max(len(prompts[i]) for i in members)
            engine = Engine.fitted(
                decoder=Decoder(config, self.dtype, scan=False), sampling=sampling,
                slots=self.slots, max_prompt=bucket(longest), max_new_tokens=max_new_tokens,
                stop_ids=stops, prefill_rows=min(8, self.slots), mesh=self._decode_mesh,
            )  # fmt: skip
            requests = [
                Request(i, prompts[i], greedy, samples, _draws(prompts[i])) for i in members
            ]
            params = self._params_for(answering=True)
            for response in engine.generate(
                params, requests, seed=seed, iteration=0, progress=progress, ended=ended
            ):
                found[response.index].append(response)
        return found

    # Scores

    def logprobs(
        self, examples: Sequence[Example], progress: Advance = lambda examples, tokens=0: None
    ) -> list[tuple[float, ...]]:
        """log pi(response | prompt) of every response of every example, in nats."""
        found = self.statistics(examples, progress)
        return [tuple(float(r.logprob.sum(dtype=float)) for r in each) for each in found]

    def statistics(
        self, examples: Sequence[Example], progress: Advance = lambda examples, tokens=0: None
    ) -> list[tuple[TokenStats, ...]]:
        """Per response of each example `TokenStats` of its tokens, numpy arrays [tokens].

        Examples of like length share a batch, in which a prompt is read once for all its
        responses; a length's program is compiled once.

        Raises:
          EvaluationError: an example beyond the model's positions.
        """
        found: list[tuple[TokenStats, ...]] = [()] * len(examples)
        # A response's last token predicts nothing that is scored: it needs no position.
        lengths = [len(e.prompt) + max(map(len, e.responses)) - 1 for e in examples]
        for config, members in self._by_config(lengths):
            decoder, params = Decoder(config, self.dtype), self._params_for(answering=False)
            for time, groups in self._by_length(members, examples):
                those = [[examples[i] for i in group] for group in groups]
                need = max(len(assign_rows(each, time)) for each in those)
                rows = min(-(-need // self._ways) * self._ways, self._rows(time))
                shape = common_shape(those, rows=rows, time=time)
                for group, each in zip(groups, those, strict=True):
                    out = []
                    for batch in pack(each, shape):
                        placed = place_rows(batch, self.mesh)
                        out.append(jax.device_get(self._statistics(decoder, params, placed)))
                        progress(int(batch.weight.sum()), int((batch.segment > 0).sum()))
                    fields = [unpack_tokens(each, shape, x) for x in zip(*out, strict=True)]
                    for i, *parts in zip(group, *fields, strict=True):
                        found[i] = tuple(TokenStats(*x) for x in zip(*parts, strict=True))
        return found

    def _by_length(
        self, which: Sequence[int], examples: Sequence[Example]
    ) -> Iterator[tuple[int, list[list[int]]]]:
        """(tokens of a row, groups of examples that are packed together), longest rows first."""
        by_time: dict[int, list[int]] = {}
        for i in sorted(which, key=lambda i: -examples[i].tokens):
            by_time.setdefault(_row_length(examples[i].tokens), []).append(i)
        for time, members in by_time.items():
            groups, room = [[]], _GROUP * self._rows(time) * time
            for i in members:
                if room < examples[i].tokens:
                    groups.append([])
                    room = _GROUP * self._rows(time) * time
                groups[-1].append(i)
                room -= examples[i].tokens
            yield time, groups

    def _rows(self, time: int) -> int:
        """Rows of a batch: so many that the devices are busy, and scores of attention fit."""
        tokens = 2048 if jax.default_backend() == "cpu" else 16384
        scores = 2**29 // (self.facts.heads * time * time)  # float32 of one layer: 2 GiB
        return max(1, min(tokens // time, scores)) * self._ways

    # Parameters

    def _by_config(self, lengths: Sequence[int]) -> list[tuple[DecoderConfig, list[int]]]:
        """Which sequences go under which facts. Those differ for a model with two tables of rotary
        frequencies alone: a sequence's own length, not its neighbours', says which table it gets."""
        by_config: dict[DecoderConfig, list[int]] = {}
        for i, length in enumerate(lengths):
            if length > self.facts.max_positions:
                raise EvaluationError(
                    f"{self.name}: sequence {i} may have {length} tokens with its answer; the model "
                    f"was made for {self.facts.max_positions} (max_position_embeddings)"
                )
            config = self.facts.for_length(length)
            by_config.setdefault(config, []).append(i)
        return list(by_config.items())

    @property
    def _ways(self) -> int:
        """How many ways rows are cut."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @property
    def _decode_mesh(self) -> jax.sharding.Mesh:
        return decode_mesh(self.mesh, self.mesh.shape["tensor"])

    def _params_for(self, answering: bool) -> Params:
        """One tree per layer to answer with, stacked layers to score with; one of them is held."""
        where = shardings(abstract_params(self.facts), self.mesh, TRAINING)
        params = self._params
        if params is None:
            params = load(self.folder.path, self.facts, dtype=self.dtype, shardings=where)
        if answering and "layers" in params:
            places = decoding_shardings(self.facts, self._decode_mesh)
            params = decoding_params(params, self.dtype, places)
        elif not answering and "layers" not in params:
            params = jax.jit(stack, out_shardings=where)(params)
        self._params = params
        return params


def _statistics(decoder: Decoder, params: Params, batch: PreferenceBatch) -> TokenStats:
    """Of all scored tokens of a packed batch, [rows, scored]."""
    mask = tree_mask(batch.segment, batch.branch)
    hidden, _ = decoder.apply({"params": params}, batch.tokens, batch.position, mask)
    predicting = jnp.take_along_axis(hidden, batch.predictor[..., None], axis=1)
    cap = decoder.config.logit_cap
    return token_statistics(predicting, batch.target, unembedding(params), _CHUNK, cap)


def _draws(prompt: Ids) -> int:
    """Names the random numbers of a prompt's answers by what it says, wherever it stands."""
    digest = hashlib.sha256(np.asarray(prompt, np.int32).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _row_length(tokens: int) -> int:
    """Of rows for examples of so many tokens: 128, 192, 256, 384, 512, ..., 1.5 times at most."""
    power = 1 << max(7, (tokens - 1).bit_length())
    return power * 3 // 4 if power > 128 and tokens <= power * 3 // 4 else power
