"""A language model that answers prompts and scores answers.

    responses = policy.answer(numbered(prompts, greedy=1, samples=2), max_new_tokens=512)
    logps = policy.logps(examples)

A response depends only on the parameters, the seed, its prompt and the numbers that identify its
random draws. A log-probability depends only on the parameters and the tokens. Other requests, and
their order, change neither. Slots, batches and meshes change the shapes of matrix products, which
may be rounded differently: then a few answers become other draws of equal standing.

A policy that is not told its slots and prefill rows chooses them from the memory of the device, and
takes fewer where memory runs out (`policy.fitting`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selm_jax.config.kinds import AttentionBackEnd
from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Decoder, Params
from selm_jax.objectives.logprobs import TokenStats
from selm_jax.parallel.rules import TRAINING, Rules, place_rows
from selm_jax.policy.fitting import Fitting
from selm_jax.policy.needs import generation
from selm_jax.policy.sizes import BatchSizes, Generation
from selm_jax.policy.weights import Weights
from selm_jax.preferences.examples import Example, Ids
from selm_jax.preferences.layouts import ByLength, Layout, OneShape
from selm_jax.rollout.engine import Engine, bucket
from selm_jax.rollout.requests import Request, Response
from selm_jax.rollout.sampling import Sampling
from selm_jax.shell.progress import Advance
from selm_jax.text.chat import Chat, ChatError, Turn
from selm_jax.text.tokenizer import Tokenizer
from selm_jax.training.scoring import Scorer, readers

_T = TypeVar("_T")


class PolicyError(ValueError):
    """The model cannot fulfil a request, such as a prompt that is too long."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """The sizes of batches. All except `longest_sequence` change results only by rounding.

    Attributes:
      slots: the number of answers that are drawn at the same time; None chooses it from memory.
      prefill_rows: the number of prompts per prefill; None chooses it from memory.
      longest_prompt: the length of the longest prompt in tokens, so that one program serves all
        calls; None takes the longest prompt of each call.
      longest_sequence: for a model with two tables of rotary frequencies, the length that chooses
        the table for all sequences (`DecoderConfig.for_length`), as in training; None chooses by
        each sequence's own length.
      rows: the rows of a packed batch that is scored; None fits batches to the lengths and the
        devices.
      row_length: the tokens per row, if the number of rows is given; None takes those of the
        longest example.
      chunk: the tokens per row whose logits are in memory at a time.
    """

    slots: int | None = None
    prefill_rows: int | None = None
    longest_prompt: int | None = None
    longest_sequence: int | None = None
    rows: int | None = None
    row_length: int | None = None
    chunk: int = 32

    @property
    def fixed(self) -> dict[str, int]:
        """The given sizes of generation, by their names in `policy.sizes.BatchSizes`."""
        given = {"slots": self.slots, "prefill_rows": self.prefill_rows}
        return {name: value for name, value in given.items() if value is not None}

    def layout(self, ways: int, heads: int) -> Layout:
        if self.rows is not None:
            return OneShape(self.rows, self.row_length)
        return ByLength(ways, 2048 if jax.default_backend() == "cpu" else 16384, heads)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer. `finish` is "stop" if `token_ids` ends with a stop token, otherwise "length"."""

    text: str
    token_ids: Ids
    finish: str


class Policy:
    """A model that answers prompts and scores answers.

    Attributes:
      name: the model's name in tables, files and error messages.
      config: the decoder's configuration.
      weights: the model's parameters.
      batches: the sizes of batches.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Params],
        config: DecoderConfig,
        *,
        chat: Callable[[], Chat],
        stop_ids: Callable[[], Ids],
        mesh: Mesh,
        decode_mesh: Mesh,
        dtype: Any,
        rules: Rules = TRAINING,
        batches: Batches = Batches(),
        back_end: AttentionBackEnd = "auto",
        say: Callable[[str], None] = lambda text: None,
    ):
        """Makes a policy whose parameters and tokenizer are read on first use.

        Args:
          load: reads the parameters on first use (`Weights`).
          chat, stop_ids: called on first use, because not every model has a chat template.
          decode_mesh: the devices of `mesh` in the same order (`parallel.mesh.decode_mesh`).
          dtype: the compute dtype.
          back_end: the implementation of attention.
          say: tells the user which sizes were chosen, and what was given up.
        """
        self.name, self.config, self.dtype, self.batches = name, config, dtype, batches
        self.mesh, self.decode_mesh, self.rules = mesh, decode_mesh, rules
        self.back_end: AttentionBackEnd = back_end
        self.weights = Weights(
            load, config, dtype=dtype, mesh=mesh, decode_mesh=decode_mesh, rules=rules
        )
        self._chat, self._stop_ids = chat, stop_ids
        self._fitting = Fitting(name, batches.fixed, say)

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer and chat template. Raises ChatError if the model has no chat template."""
        return self._chat()

    @property
    def tokenizer(self) -> Tokenizer:
        return self.chat.tokenizer

    @cached_property
    def stop_ids(self) -> Ids:
        return self._stop_ids()

    def fitting(self) -> Policy:
        """Returns the same model in batches that fit each call, for texts that no setting knows.

        Both read the same parameters.
        """
        found = copy.copy(self)
        b = self.batches
        found.batches = Batches(b.slots, b.prefill_rows, chunk=b.chunk)
        return found

    def prompt_ids(self, conversations: Sequence[Sequence[Turn]]) -> list[Ids]:
        """The token ids of conversations, each followed by the header of its answer.

        Raises:
          ChatError: the template rejects a conversation; the message gives its index, from 0.
        """
        found = []
        for i, messages in enumerate(conversations):
            try:
                found.append(self.chat.prompt_ids(messages))
            except ChatError as e:
                raise ChatError(f"conversation {i}: {e}") from e
        return found

    def answer(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
        seed: int = 0,
        progress: Advance = lambda answers, tokens=0: None,
        ended: Callable[[Ids], bool] | None = None,
        also_stop: Ids = (),
    ) -> list[Response]:
        """The responses to all requests, in the order (index, sample).

        Args:
          progress: called with the responses finished and tokens drawn since the last call.
          ended: may end responses before a stop token; see `Engine.generate`.
          also_stop: stop tokens in addition to the model's own.

        Raises:
          PolicyError: a prompt leaves no room for its answer.
        """
        stops = tuple(sorted({*self.stop_ids, *also_stop}))
        found: list[Response] = []
        for config, members in self._by_config([len(r.prompt) + max_new_tokens for r in requests]):
            mine = [requests[i] for i in members]
            longest = self.batches.longest_prompt or bucket(max(len(r.prompt) for r in mine))

            def answered(
                sizes: BatchSizes, told: Advance, config=config, mine=mine, longest=longest
            ) -> list[Response]:
                engine = Engine.fitted(
                    decoder=Decoder(
                        config, self.dtype, scan=False, back_end=self.back_end,
                        mesh=self.decode_mesh,
                    ),
                    sampling=sampling,
                    slots=sizes.slots, max_prompt=longest, max_new_tokens=max_new_tokens,
                    stop_ids=stops, prefill_rows=sizes.prefill_rows, mesh=self.decode_mesh,
                )  # fmt: skip
                return engine.generate(
                    self.weights.to_answer(), mine, seed=seed, iteration=0, progress=told,
                    ended=ended,
                )  # fmt: skip

            needs = partial(self._needs, config, mine, longest, max_new_tokens)
            found += self._fitting.do(answered, needs, progress)
        return sorted(found, key=lambda r: (r.index, r.sample))

    def _needs(
        self, config: DecoderConfig, requests: Sequence[Request], longest: int, new_tokens: int
    ) -> Generation:
        return generation(
            config, self.dtype, self.decode_mesh, prompt=longest, new_tokens=new_tokens,
            wanted=[sum(len(r.wanted()) for r in requests)],
            each=max(len(r.wanted()) for r in requests), attention=self.back_end,
            beside=self.weights.stacked_bytes,
        )  # fmt: skip

    def reply(
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
        """Answers conversations that end with a user's turn; returns a list per conversation.

        Args:
          temperature: 0 gives the greedy answer, and only one.
          seed: decides an answer, together with the conversation and the number of the sample
            (`named_by_text`).
          filters: other settings of `Sampling`, such as `top_p`.

        Raises:
          ChatError: the template rejects a conversation.
          PolicyError: a conversation leaves no room for its answer.
        """
        greedy = temperature == 0
        if greedy and samples != 1:
            raise PolicyError(
                f"temperature 0 gives one answer, but samples is {samples}. Set samples to 1, or "
                "raise the temperature"
            )
        prompts = self.prompt_ids(conversations)
        responses = self.answer(
            named_by_text(prompts, greedy=int(greedy), samples=0 if greedy else samples),
            max_new_tokens=max_new_tokens,
            sampling=Sampling() if greedy else Sampling(temperature, **filters),
            seed=seed, progress=progress,
        )  # fmt: skip
        found: list[list[Answer]] = [[] for _ in prompts]
        for r in responses:
            found[r.index].append(Answer(self.chat.text(r.tokens), r.tokens, r.finish))
        return found

    def logps(
        self, examples: Sequence[Example], progress: Advance = lambda examples, tokens=0: None
    ) -> list[tuple[float, ...]]:
        """log pi(response | prompt) of every response of every example, in nats, float32.

        Raises:
          PolicyError: an example is longer than the model's context.
          ExampleError: an example is longer than `batches.row_length`.
        """
        return self._scored(Scorer.logps, examples, progress)

    def statistics(
        self, examples: Sequence[Example], progress: Advance = lambda examples, tokens=0: None
    ) -> list[tuple[TokenStats, ...]]:
        """The `TokenStats` of every response of every example, as numpy arrays [tokens].

        It raises the same errors as `logps`.
        """
        return self._scored(Scorer.statistics, examples, progress)

    def features(
        self, examples: Sequence[Example], progress: Advance = lambda examples, tokens=0: None
    ) -> list[tuple[np.ndarray, ...]]:
        """The last layer's output at each response's last token, as numpy arrays [embed].

        It raises the same errors as `logps`.
        """
        return self._scored(Scorer.features, examples, progress)

    def rewards(
        self, examples: Sequence[Example], progress: Advance = lambda examples, tokens=0: None
    ) -> list[tuple[float, ...]]:
        """The reward of every response of every example, for a model with a reward head.

        It raises the same errors as `logps`.
        """
        return self._scored(Scorer.rewards, examples, progress, unread=0)

    def _scored(
        self,
        score: Callable[..., list[_T]],
        examples: Sequence[Example],
        progress: Advance,
        unread: int = 1,
    ) -> list[_T]:
        # No scored token follows a response's last token, so that token needs no position.
        lengths = [len(e.prompt) + max(map(len, e.responses)) - unread for e in examples]
        found: dict[int, _T] = {}
        for config, members in self._by_config(lengths):
            mine = [examples[i] for i in members]
            of_mine = score(self._scorer(config), self.weights.to_score(), mine, progress)
            found.update(zip(members, of_mine, strict=True))
        return [found[i] for i in range(len(examples))]

    def _scorer(self, config: DecoderConfig) -> Scorer:
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return Scorer(
            readers(
                Decoder(config, self.dtype, back_end=self.back_end, mesh=self.mesh),
                self.batches.chunk,
                everywhere,
            ),
            partial(place_rows, mesh=self.mesh, rules=self.rules),
            self.batches.layout(ways, config.heads),
        )

    def _by_config(self, lengths: Sequence[int]) -> list[tuple[DecoderConfig, list[int]]]:
        """Groups the indices of sequences by the config that they need."""
        by_config: dict[DecoderConfig, list[int]] = {}
        for i, length in enumerate(lengths):
            if length > self.config.max_positions:
                raise PolicyError(
                    f"{self.name}: sequence {i} may have {length} tokens with its answer, but the "
                    f"model reads at most {self.config.max_positions} (max_position_embeddings). "
                    "Shorten the prompt, or allow fewer new tokens"
                )
            config = self.config.for_length(self.batches.longest_sequence or length)
            by_config.setdefault(config, []).append(i)
        return list(by_config.items())


def numbered(prompts: Sequence[Ids], *, greedy: int, samples: int) -> list[Request]:
    """Makes requests whose random draws depend on a prompt's index in the list of prompts."""
    return [Request(i, prompt, greedy, samples) for i, prompt in enumerate(prompts)]


def named_by_text(prompts: Sequence[Ids], *, greedy: int, samples: int) -> list[Request]:
    """Makes requests whose random draws depend on a prompt's tokens and not on its index.

    This is for prompts that come in any order, a few at a time. Equal prompts get equal responses.
    """
    return [Request(i, prompt, greedy, samples, _name(prompt)) for i, prompt in enumerate(prompts)]


def _name(prompt: Ids) -> int:
    digest = hashlib.sha256(np.asarray(prompt, np.int32).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
