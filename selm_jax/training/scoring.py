"""Scoring: log-probabilities or rewards of every response of examples under fixed parameters.

    scorer = Scorer(readers(decoder, chunk, replicated), place, OneShape(rows, row_length))
    logps = scorer.logps(params, examples)

All scoring goes through this module: a run's, `selm eval`'s, a reward model's as a ranker. They
differ only in their layouts (`preferences.layouts`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Sharding

from selm_jax.models.decoder import Decoder, Params
from selm_jax.objectives.logprobs import TokenStats, token_statistics
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import Layout
from selm_jax.preferences.packing import PreferenceBatch, Shape, pack, unpack, unpack_tokens
from selm_jax.preferences.rewards import response_features, response_rewards
from selm_jax.training.update import Update, of_scored, response_logps

# Called with the number of examples and of tokens scored since the last call.
Report = Callable[[int, int], None]

A = TypeVar("A")
B = TypeVar("B")


class Readers(NamedTuple):
    """Compiled functions that score a batch; parameters and batch may be sharded over devices.

    Their results are replicated on every device.

    logps(params, batch) -> response log-probabilities [rows, segments, branches]
    rewards(params, batch) -> a reward model's rewards [rows, segments, branches]
    features(params, batch) -> the last layer's outputs [rows, segments, branches, embed]
    statistics(params, batch) -> TokenStats [rows, scored]
    """

    logps: Callable[..., Any]
    rewards: Callable[..., Any]
    features: Callable[..., Any]
    statistics: Callable[..., Any]


def readers(decoder: Decoder, chunk: int, replicated: Sharding | None = None) -> Readers:
    """Makes the `Readers` of a decoder, jitted functions that score batches.

    Each function compiles at its first call with a shape, once for all models of one config.

    Args:
      decoder: the model.
      chunk: tokens per row whose logits are computed at a time.
      replicated: the sharding of results; None means one device.
    """
    return _readers(cast(Any, decoder), chunk, replicated)


@functools.lru_cache(maxsize=16)
def _readers(decoder: Decoder, chunk: int, replicated: Sharding | None) -> Readers:
    def compiled(of_batch: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(of_batch, out_shardings=replicated)

    return Readers(
        logps=compiled(lambda params, batch: response_logps(decoder, params, batch, chunk)),
        rewards=compiled(lambda params, batch: response_rewards(decoder, params, batch)),
        features=compiled(lambda params, batch: response_features(decoder, params, batch)),
        statistics=compiled(
            lambda params, batch: of_scored(token_statistics, decoder, params, batch, chunk)[0]
        ),
    )


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores responses in few shapes, because each function compiles once per shape.

    Attributes:
      read: the compiled functions. A run's `Update` gives the same scores but has neither
        `statistics` nor `features`.
      place: puts a batch on the devices.
      layout: groups examples into batches and gives each its shape.
    """

    read: Readers | Update
    place: Callable[[PreferenceBatch], PreferenceBatch]
    layout: Layout

    def logps(
        self,
        params: Params,
        examples: Sequence[Example],
        report: Report = lambda examples, tokens=0: None,
    ) -> list[tuple[float, ...]]:
        """log pi(response | prompt) in nats: a tuple per example, with a number per response.

        Raises:
          ExampleError: if an example does not fit a row.
        """
        return self._scored(self.read.logps, params, examples, report, unpack)

    def logps_by_token(
        self,
        params: Params,
        examples: Sequence[Example],
        report: Report = lambda examples, tokens=0: None,
    ) -> list[tuple[tuple[float, ...], tuple[np.ndarray, ...]]]:
        """The result of `logps`, and the log-probabilities of each response's tokens.

        It needs the `Update` of a run.
        """
        compiled = cast(Update, self.read).logps_by_token
        return self._scored(compiled, params, examples, report, _unpack_both)

    def rewards(
        self,
        params: Params,
        examples: Sequence[Example],
        report: Report = lambda examples, tokens=0: None,
    ) -> list[tuple[float, ...]]:
        """The rewards of a reward model: per example a tuple, with a number per response."""
        return self._scored(self.read.rewards, params, examples, report, unpack)

    def features(
        self,
        params: Params,
        examples: Sequence[Example],
        report: Report = lambda examples, tokens=0: None,
    ) -> list[tuple[np.ndarray, ...]]:
        """The last layer's output at each response's last token, as numpy arrays [embed]."""
        return self._scored(cast(Readers, self.read).features, params, examples, report, unpack)

    def statistics(
        self,
        params: Params,
        examples: Sequence[Example],
        report: Report = lambda examples, tokens=0: None,
    ) -> list[tuple[TokenStats, ...]]:
        """The `TokenStats` of each response's tokens, as numpy arrays [tokens]; see `logps`."""
        return self._scored(self.read.statistics, params, examples, report, _unpack_statistics)

    def _scored(
        self,
        compiled: Callable[..., Any],
        params: Params,
        examples: Sequence[Example],
        report: Report,
        unpacked: Callable[[Sequence[Example], Shape, Sequence[Any]], list[tuple[Any, ...]]],
    ) -> list[tuple[Any, ...]]:
        groups = list(self.layout(examples)) if examples else []
        batches = (
            (n, batch)
            for n, group in enumerate(groups)
            for batch in pack([examples[i] for i in group.which], group.shape)
        )
        values: list[list[Any]] = [[] for _ in groups]
        for (n, batch), of_batch in one_ahead(
            batches, lambda numbered: compiled(params, self.place(numbered[1]))
        ):
            values[n].append(of_batch)
            report(int(batch.weight.sum()), int((batch.segment > 0).sum()))
        found: list[tuple[Any, ...]] = [()] * len(examples)
        for (which, shape), of_group in zip(groups, values, strict=True):
            those = unpacked([examples[i] for i in which], shape, of_group)
            for i, of_example in zip(which, those, strict=True):
                found[i] = of_example
        return found


def one_ahead(items: Iterable[A], start: Callable[[A], B]) -> Iterator[tuple[A, B]]:
    """Yields each item with the result of `start(item)`, copied to the host as numpy arrays.

    The devices work on one item while the host prepares the next.
    """
    running: deque[tuple[A, B]] = deque()
    for item in items:
        running.append((item, start(item)))
        if len(running) == 2:
            first, values = running.popleft()
            yield first, jax.device_get(values)
    for item, values in running:
        yield item, jax.device_get(values)


def _unpack_both(
    examples: Sequence[Example], shape: Shape, batches: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[Any, ...]]:
    of_responses, of_tokens = zip(*batches, strict=True)
    both = unpack(examples, shape, of_responses), unpack_tokens(examples, shape, of_tokens)
    return list(zip(*both, strict=True))


def _unpack_statistics(
    examples: Sequence[Example], shape: Shape, batches: Sequence[TokenStats]
) -> list[tuple[TokenStats, ...]]:
    fields = [unpack_tokens(examples, shape, of) for of in zip(*batches, strict=True)]
    return [
        tuple(TokenStats(*of_response) for of_response in zip(*of_example, strict=True))
        for of_example in zip(*fields, strict=True)
    ]
