"""A ranker that scores responses with a reward model: a decoder with a scalar head.

A reward model is a `*ForSequenceClassification` with one label. It reads the conversation with the
answer, written by the model's own chat template; the score is the head's output at the last token,
by transformers' rule (`ScalarHead.read`). A score depends on its own text only, not on padding or
on other texts in the batch.

The answers to one question share a prefix, so they are read as prompt trees
(`preferences.packing`): the prefix once, and each answer as a branch. Attention computes whole
rows, so a larger tree saves matrix products but costs more attention: an answer joins a tree only
if that is cheaper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float64

from selm_jax.config import Text
from selm_jax.feedback.models.settings import (
    BATCH,
    Batch,
    Needs,
    batch_of,
    check_choice,
    checked_batch,
    checked_dtype,
    reported,
)
from selm_jax.feedback.ranker import FeedbackError, Question, check_questions, check_scores
from selm_jax.models.attention import holds_all_scores
from selm_jax.models.config import DecoderConfig, LongRope
from selm_jax.models.decoder import Decoder, Params, abstract_params
from selm_jax.models.families import read_config
from selm_jax.models.flops import forward
from selm_jax.parallel.alone import own_devices
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.policy.sizes import of_layers
from selm_jax.preferences.examples import Example, Ids
from selm_jax.preferences.layouts import Trees
from selm_jax.preferences.rewards import split
from selm_jax.shell.memory import shard_bytes
from selm_jax.shell.ranges import Axis, Count
from selm_jax.text.chat import Chat, ChatError
from selm_jax.training.scoring import Readers, Scorer, readers
from selm_jax.weights.huggingface import check, load
from selm_jax.weights.sources import resolve

TOO_LONG = ("error", "cut")

# Maximum tokens of a tree with several branches: memory grows with the square of the tokens.
TOGETHER = 1024

# Cost of an attention score (mask, softmax, memory) relative to its matrix products. Measured on
# CPU with the models of benchmarks/reward_model_torch.py; 2 and 8 give almost the same trees.
_AROUND = 4

_COUNTED = ("candidates", "cut", "tokens")


class RewardModel:
    """A ranker that scores responses with a reward model (see `ranker.Ranker`)."""

    name = "reward_model"

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        chat: Chat,
        mesh: jax.sharding.Mesh,
        *,
        max_length: int,
        too_long: str,
        dtype: Any,
        batch: Batch,
    ):
        """Stores the settings; use `reward_model`, which documents them, to build a RewardModel."""
        assert config.head is not None
        self.config, self._head = config, config.head
        self._folder, self._chat, self._mesh, self._dtype = folder, chat, mesh, dtype
        self.folders = (folder,)
        self._max_length, self._cut = max_length, too_long == "cut"
        self._counts: Counter[str] = Counter()
        self._batch = batch
        self.batches = (batch,)

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Scores the candidates: one float64 array `[candidates]` per question.

        Each call reads the weights from the folder and frees them afterwards, because in a run the
        training that follows needs the memory.

        Raises:
            FeedbackError: questions and candidates do not match, a conversation is too long or
                refused by the chat template, or a score is not finite.
        """
        check_questions(self.name, questions, candidates)
        self._counts.clear()
        each = [
            [self._ids(question, i, text) for i, text in enumerate(texts)]
            for question, texts in zip(questions, candidates, strict=True)
        ]
        of_question = [
            trees(q.id, ids, self.config) for q, ids in zip(questions, each, strict=True)
        ]
        examples = [tree for some in of_question for tree in some]
        self._counts["tokens"] = sum(tree.tokens for tree in examples)
        work = partial(self._rewards, examples)
        rewards = iter(self._batch.fitting(work, self._counts) if examples else ())
        of_each = []
        for some, conversations in zip(of_question, each, strict=True):
            reward = {
                tree.prompt + rest: float(value)
                for tree in some
                for rest, value in zip(tree.responses, next(rewards), strict=True)
            }
            of_each.append([reward[ids] for ids in conversations])
        return check_scores(self.name, questions, candidates, of_each)

    def _rewards(self, examples: Sequence[Example], batch: int) -> list[tuple[float, ...]]:
        ways = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        compiled = program(self.config, self._dtype, self._mesh)
        scorer = Scorer(compiled, partial(place_rows, mesh=self._mesh), Trees(ways, batch))
        return scorer.rewards(self._load(), examples)

    def report(self) -> dict[str, float]:
        """The counts of the last call of `scores`.

        Keys: `candidates` (answers read), `cut` (answers cut at `max_length`) and `tokens`
        (computed tokens; a prefix that several answers share counts once), and `batch_halved` if
        memory ran out.
        """
        return reported(self._counts, _COUNTED)

    def _ids(self, question: Question, candidate: int, text: str) -> Ids:
        """The token ids of a prompt with one candidate, up to the token where the score is read."""
        try:
            ids = self._chat.conversation_ids(question.messages, text)
        except ChatError as e:
            raise FeedbackError(f"ranker {self.name!r}, prompt {question.id!r}: {e}") from e
        self._counts["candidates"] += 1
        if len(ids) > self._max_length:
            if not self._cut:
                raise FeedbackError(
                    f"ranker {self.name!r}, prompt {question.id!r}, candidate {candidate}: with "
                    f"its prompt the answer has {len(ids)} tokens, but max_length is "
                    f"{self._max_length} (the model supports {self.config.max_positions}). Raise "
                    "max_length, shorten the answers (rollout.max_new_tokens), or set too_long: "
                    "cut, which cuts such texts at max_length and counts them"
                )
            self._counts["cut"] += 1
            ids = ids[: self._max_length]
        return self._head.read(ids)

    def _load(self) -> Params:
        where = shardings(abstract_params(self.config), self._mesh, TRAINING)
        return load(self._folder, self.config, dtype=self._dtype, shardings=where)


def program(config: DecoderConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Readers:
    """Compiles the functions that read the model's outputs; a ranker calls `rewards`."""
    return readers(Decoder(config, dtype, mesh=mesh), 1, NamedSharding(mesh, PartitionSpec()))


def needs(config: DecoderConfig, dtype: Any, mesh: jax.sharding.Mesh) -> Needs:
    """The bytes of the sharded parameters, and of a layer for 512 tokens of the longest trees."""
    boxed = abstract_params(config)
    where = shardings(boxed, mesh, TRAINING)
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where),
        nn.unbox(boxed), where,
    )  # fmt: skip
    whole = holds_all_scores("auto", TOGETHER, mesh.devices.flat[0].platform)
    row = 512 * max(of_layers(config, TOGETHER * whole)) * jnp.dtype(dtype).itemsize
    return Needs(shard_bytes(placed), row)


def trees(name: str, conversations: Sequence[Ids], config: DecoderConfig) -> list[Example]:
    """Packs a question's distinct conversations into trees that store the shared prompt only once.

    Raises:
        FeedbackError: a conversation has only a single token.
    """
    if not conversations:
        return []
    different = tuple(dict.fromkeys(conversations))
    prompt, rests = split(different)
    if not prompt:
        raise FeedbackError(
            f"ranker 'reward_model', prompt {name!r}: a conversation has only "
            f"{min(map(len, different))} token. Raise max_length, or check what the chat template "
            "writes"
        )
    found: list[list[Ids]] = []
    tokens = 0  # of the last tree
    for rest in sorted(rests, key=len):
        if not found or not _joins(len(prompt), tokens, len(rest), config):
            found.append([])
            tokens = len(prompt)
        found[-1].append(rest)
        tokens += len(rest)
    return [Example(name, prompt, tuple(each), {}) for each in found]


def _joins(begin: int, end: int, more: int, config: DecoderConfig) -> bool:
    """Says whether adding an answer of `more` tokens to a tree costs less than a new tree for it.

    The tree has `end` tokens, its prompt `begin`. A row of n tokens costs d n + a n^2.
    """
    one = forward(config, rows=1, time=1, keys=1, scored=0)
    d, a = one.dense, one.attention * (1 + _AROUND)
    alone = d * (begin + more) + a * (begin + more) ** 2
    behind = d * more + a * ((end + more) ** 2 - end**2)
    return end + more <= TOGETHER and behind < alone


def reward_model(
    source: str,
    revision: str | None = None,
    template: Mapping[str, Any] | None = None,
    max_length: Count | None = None,
    too_long: str = "error",
    dtype: str = "auto",
    batch: Annotated[int, BATCH] | None = None,
    data: Axis = 1,
    fsdp: Axis = -1,
    tensor: Axis = 1,
) -> RewardModel:
    """Opens a reward model in a folder or on the Hub, for all devices of this process.

    Args:
        source: folder or Hub id with the config.json of a `*ForSequenceClassification` with one
            label (of a family in `models.families`), a tokenizer with chat template, safetensors.
        revision: revision of a Hub id.
        template: variables of the chat template, such as `{enable_thinking: false}`.
        max_length: maximum tokens of a conversation with its answer. None is the model's limit;
            with two tables of rotary frequencies (LongRoPE) it is the limit of the first, since a
            longer text would change all scores to those of the second.
        too_long: what to do with a longer conversation: `error`, or `cut` its end and count it.
        dtype: dtype of parameters and activations: `auto` (bfloat16, but float32 on CPU), `float32`
            or `bfloat16`. Softmax, norms and the head are always float32.
        batch: how many rows of 512 tokens one device computes at once (fewer if they are longer).
            None takes what fits into memory, at most 16, or 2 on CPU, which has smaller caches.
        data, fsdp, tensor: axes of the mesh, as under `compute`; parameters are split over the last
            two, rows over the first two.

    Raises:
        FeedbackError: a setting is unknown, the model gives no scores, or has no chat template.
        SourceError: there is no such folder or Hub id, or no safetensors in it.
        UnsupportedModel: config.json describes an unknown model, or not exactly one label.
        WeightsError: the tensors are not those of the model; for example `score.weight` is missing.
    """
    check_choice("reward_model", "too_long", too_long, TOO_LONG)
    on_cpu = jax.default_backend() == "cpu"
    kind = checked_dtype("reward_model", dtype, on_cpu)
    checked_batch("reward_model", batch, on_cpu)
    folder = resolve(source, revision=revision).path
    config = read_config(folder)
    if config.head is None:
        raise FeedbackError(
            f"ranker 'reward_model': {source} is a language model ({config.architecture}), which "
            "gives no scores; expected a *ForSequenceClassification with one label. To train one "
            "from it: `objective: {loss: bradley_terry}` (docs/feedback.md)"
        )
    longest = positions(config) if max_length is None else max_length
    config = config.for_length(longest)
    try:
        chat = Chat(folder, Text(template=dict(template or {})), config.vocab_size)
    except ChatError as e:
        raise FeedbackError(
            f"ranker 'reward_model': {e}. A reward model needs a chat template: usually the "
            "tokenizer and template of the model that it was trained from work"
        ) from e
    check(folder, config)
    mesh = make_mesh((data, fsdp, tensor), own_devices())
    rows = batch_of("reward_model", batch, needs(config, kind, mesh), on_cpu)
    return RewardModel(
        folder, config, chat, mesh, max_length=longest, too_long=too_long, dtype=kind, batch=rows
    )


def positions(config: DecoderConfig) -> int:
    """Returns how many tokens the model supports without switching to other rotary frequencies."""
    scalings = [kind.rope.scaling for kind in config.kinds if kind.rope is not None]
    originals = [each.original for each in scalings if isinstance(each, LongRope)]
    return min([config.max_positions, *originals])
