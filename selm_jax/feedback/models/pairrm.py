"""PairRM, the ranker of the SELM paper: reads two responses together and says which is better.

Model: Jiang et al. 2023 (LLM-Blender, arXiv 2306.02561). The input of a pair has three segments

    [CLS] <|source|> S [SEP]  [CLS] <|candidate1|> A [SEP]  [CLS] <|candidate2|> B [SEP]

and the output is logit(A, B), above 0 if A is better. It is not antisymmetric: the order matters.
So the scores compare all candidates of a prompt in both orders: score_i = mean over j of
logit(i, j) - logit(j, i).

A source or candidate that exceeds its token budget is cut at the end. The source's budget is 1224
tokens; each candidate's is 412 plus half of what the source does not use. Cut texts are counted
(`PairRM.report`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float64, Int

from selm_jax.feedback.models.pairrm_inputs import FIRST, SOURCE, Ids, PairTokens, conversation
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
from selm_jax.models.deberta import PairScorer, Params, abstract_params
from selm_jax.parallel.alone import own_devices
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.preferences.layouts import Part, parts
from selm_jax.preferences.selection import ranks
from selm_jax.shell.memory import shard_bytes
from selm_jax.training.scoring import one_ahead
from selm_jax.weights.deberta import PairRMConfig, load, read_config
from selm_jax.weights.sources import resolve

COMPATS = ("per_row", "llm_blender")
MODES = ("[A,B]+[B,A]", "[A,B]", "[B,A]")

# LLM-Blender's default batch sizes: its budgets depend on the other rows of the batch.
_BLENDER_RANK, _BLENDER_COMPARE = 8, 4

_COUNTED = ("sources", "sources_cut", "candidates", "candidates_cut", "comparisons")


class Comparison(NamedTuple):
    """Indices of two candidates to compare, in this order, and of the row that they are in."""

    row: int
    first: int
    second: int


class _Row(NamedTuple):
    """A prompt and its candidates as token ids with special tokens, cut to PairRM's limits."""

    source: Ids
    candidates: list[Ids]

    def length(self, pair: Comparison) -> int:
        first, second = self.candidates[pair.first], self.candidates[pair.second]
        return len(self.source) + len(first) + len(second)


class PairRM:
    """The PairRM ranker (see `ranker.Ranker`), with methods for single comparisons."""

    name = "pairrm"
    relative = True

    def __init__(
        self,
        config: PairRMConfig,
        params: Params,
        tokens: PairTokens,
        mesh: jax.sharding.Mesh,
        *,
        compat: str = "per_row",
        dtype: Any = jnp.float32,
        batch: Batch,
        folder: Path | None = None,
    ):
        """Stores the settings; use `pairrm`, which documents them, to load a PairRM from a folder.

        Args:
            params: parameters of `PairScorer`, replicated on the mesh.
            mesh: batches are split over its axis `data`.
            folder: the folder that the parameters come from.
        """
        self.batches = (batch,)
        self.folders = () if folder is None else (folder,)
        self.config, self._params, self._tokens, self._mesh = config, params, tokens, mesh
        self._compat, self._batch = compat, batch
        self.together = _BLENDER_RANK if compat == "llm_blender" else 1
        self._counts: Counter[str] = Counter()
        self._forward = program(config, dtype, on_cpu=jax.default_backend() == "cpu")

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Scores the candidates: one float64 array per question, from all n (n - 1) comparisons.

        The source is the text of the last user turn. A question with earlier answers is written in
        LLM-Blender's form for conversations (`conversation`). Neither includes a system message,
        as in the authors' own rankings.

        Raises:
            FeedbackError: questions and candidates do not match, the roles of a conversation do not
                alternate, or a score is not finite.
        """
        check_questions(self.name, questions, candidates)
        self._counts.clear()
        texts = [conversation(q, each) for q, each in zip(questions, candidates, strict=True)]
        matrices = self.matrices([source for source, _ in texts], [each for _, each in texts])
        return check_scores(self.name, questions, candidates, [mean_wins(m) for m in matrices])

    def report(self) -> dict[str, float]:
        """The counts since the last call of `scores` began: texts read, texts cut, and comparisons.

        Keys: `sources`, `sources_cut`, `candidates`, `candidates_cut`, `comparisons`, and
        `batch_halved` if memory ran out.
        """
        return reported(self._counts, _COUNTED)

    def matrices(
        self, sources: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, "n n"]]:
        """One matrix of logits per source: entry (i, j) is above 0 if candidate i beats j."""
        rows = self._encode(sources, candidates, _BLENDER_RANK)
        pairs = [
            Comparison(r, i, j)
            for r, row in enumerate(rows)
            for i in range(len(row.candidates))
            for j in range(len(row.candidates))
            if i != j
        ]
        found = [np.zeros((len(row.candidates),) * 2) for row in rows]
        for (r, i, j), logit in zip(pairs, self._logits(rows, pairs), strict=True):
            found[r][i, j] = logit
        return found

    def ranks(
        self, sources: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[Int[np.ndarray, " candidates"]]:
        """The candidates' ranks per source; 1 is best, and equal scores share the better rank."""
        return [ranks(mean_wins(m)) for m in self.matrices(sources, candidates)]

    def logits(self, pairs: Sequence[tuple[str, str, str]]) -> Float64[np.ndarray, " pairs"]:
        """Computes one logit per triple (source, A, B); above 0 if A is better."""
        return self.compare(*(zip(*pairs, strict=True) if pairs else ((), (), ())), mode="[A,B]")

    def compare(
        self,
        sources: Iterable[str],
        first: Iterable[str],
        second: Iterable[str],
        mode: str = "[A,B]+[B,A]",
    ) -> Float64[np.ndarray, " pairs"]:
        """Compares A (`first`) with B (`second`) for each source.

        Args:
            mode: `[A,B]+[B,A]` gives logit(A, B) - logit(B, A), above 0 if A is better; `[A,B]`
                gives logit(A, B); `[B,A]` gives logit(B, A), above 0 if B is better.

        Raises:
            FeedbackError: the mode is unknown.
        """
        check_choice("pairrm", "mode", mode, MODES)
        both = [[a, b] for a, b in zip(first, second, strict=True)]
        rows = self._encode(list(sources), both, _BLENDER_COMPARE)
        orders = [order for order in ("[A,B]", "[B,A]") if order in mode]
        pairs = [
            Comparison(r, 0, 1) if order == "[A,B]" else Comparison(r, 1, 0)
            for order in orders
            for r in range(len(rows))
        ]
        logits = self._logits(rows, pairs).reshape(len(orders), len(rows))
        return logits[0] - logits[1] if len(orders) == 2 else logits[0]

    def best_of(
        self, sources: Sequence[str], candidates: Sequence[Sequence[str]], seed: int | None = None
    ) -> list[int]:
        """The index of each source's best candidate, found with n - 1 comparisons per source.

        This takes n - 1 comparisons in both orders, and `ranks` n (n - 1) / 2. Each comparison is
        between the winner so far and the next candidate, which wins a tie, as in LLM-Blender. If
        the preferences are cyclic, the result depends on the order of the candidates.

        Args:
            seed: shuffles each source's candidates first; None keeps the given order.

        Raises:
            FeedbackError: a source has no candidates.
        """
        if empty := [r for r, each in enumerate(candidates) if not each]:
            raise FeedbackError(
                f"best_of: source {empty[0]} has no candidates; expected one or more."
            )
        rows = self._encode(sources, candidates, _BLENDER_RANK)
        orders = [np.arange(len(each)) for each in candidates]
        if seed is not None:
            rng = np.random.default_rng(seed)
            orders = [rng.permutation(order) for order in orders]
        best = [int(order[0]) for order in orders]
        for step in range(1, max(map(len, orders), default=1)):
            there = [r for r, order in enumerate(orders) if step < len(order)]
            next_one = {r: int(orders[r][step]) for r in there}
            pairs = [Comparison(r, best[r], next_one[r]) for r in there]
            pairs += [Comparison(r, next_one[r], best[r]) for r in there]
            forth, back = self._logits(rows, pairs).reshape(2, -1)
            for r, margin in zip(there, forth - back, strict=True):
                if margin <= 0:
                    best[r] = next_one[r]
        return best

    def _encode(
        self, sources: Sequence[str], candidates: Sequence[Sequence[str]], beside: int
    ) -> list[_Row]:
        """Encodes prompts (sources) and candidates as token ids, cut to PairRM's limits.

        Args:
            beside: how many rows share one candidate budget under `compat: llm_blender`.
        """
        if len(sources) != len(candidates):
            raise FeedbackError(
                f"pairrm: found {len(sources)} sources and {len(candidates)} lists of candidates; "
                "expected one list per source."
            )
        blender = self._compat == "llm_blender"
        flat = [text for each in candidates for text in each]
        if blender:
            sources, flat = ([t.replace("[SEP]", " ") for t in x] for x in (sources, flat))
        c = self.config
        whole = self._tokens.encode(SOURCE, sources)
        cut = [self._tokens.cut(ids, c.source_tokens) for ids in whole]
        lengths = [len(ids) for ids in cut]
        if blender:
            groups = [lengths[r - r % beside :][:beside] for r in range(len(lengths))]
            lengths = [max(group) for group in groups]
        coming = iter(self._tokens.encode(FIRST, flat))
        rows = []
        for source, length, each in zip(cut, lengths, candidates, strict=True):
            budget = c.candidate_tokens + (c.source_tokens - length) // 2
            segments = [next(coming) for _ in each]
            self._counts["candidates_cut"] += sum(len(ids) > budget for ids in segments)
            rows.append(_Row(source, [self._tokens.cut(ids, budget) for ids in segments]))
        self._counts["sources"] += len(whole)
        self._counts["sources_cut"] += sum(len(ids) > c.source_tokens for ids in whole)
        self._counts["candidates"] += len(flat)
        return rows

    def _logits(
        self, rows: Sequence[_Row], pairs: Sequence[Comparison]
    ) -> Float64[np.ndarray, " pairs"]:
        """Computes the logit of each comparison. Equal texts are compared only once."""
        same = [_first_equal(row.candidates) for row in rows]
        meant = [Comparison(r, same[r][i], same[r][j]) for r, i, j in pairs]
        todo = sorted(set(meant), key=lambda p: (-rows[p.row].length(p), p))
        self._counts["comparisons"] += len(todo)
        lengths = [rows[pair.row].length(pair) for pair in todo]
        logit: dict[Comparison, float] = {}

        def run(batch: int) -> None:
            these = parts(lengths, self._mesh.shape["data"], batch)
            for part, values in one_ahead(these, lambda part: self._run(rows, todo, part)):
                logit.update(zip((todo[n] for n in part.items), values.tolist(), strict=False))

        self._batch.fitting(run, self._counts)
        return np.array([logit[pair] for pair in meant], np.float64)

    def _run(self, rows: Sequence[_Row], todo: Sequence[Comparison], part: Part) -> jax.Array:
        """Computes the logits `[rows]` of one batch of comparisons, followed by padding rows."""
        tokens = np.full((part.rows, part.time), self._tokens.pad, np.int32)
        lengths = np.ones(part.rows, np.int32)
        prefixes = np.zeros((part.rows, 3), np.int32)
        for n, (r, i, j) in enumerate(todo[part.items.start : part.items.stop]):
            segments = (rows[r].source, rows[r].candidates[i], rows[r].candidates[j])
            starts = np.cumsum([0, *map(len, segments)])
            lengths[n], prefixes[n] = starts[-1], starts[:3] + 1  # after each [CLS]
            tokens[n, : starts[-1]] = np.concatenate(segments)
            tokens[n, prefixes[n]] = self._tokens.prefix_ids
        return self._forward(self._params, *place_rows((tokens, lengths, prefixes), self._mesh))


def program(config: PairRMConfig, dtype: Any, *, on_cpu: bool) -> Any:
    """The jitted function `(params, tokens, lengths, prefixes) -> logits`; see `PairScorer`."""
    scorer = PairScorer(config.encoder, config.tasks, dtype, _heads(on_cpu))
    return jax.jit(lambda params, *inputs: scorer.apply({"params": params}, *inputs))


def _heads(on_cpu: bool) -> int:
    """Heads computed at once: on CPU the scores of one fit in the cache; accelerators prefer 4."""
    return 1 if on_cpu else 4


def needs(config: PairRMConfig, dtype: Any, held: int, on_cpu: bool) -> Needs:
    """The bytes of the parameters, `held`, and of a layer for 512 tokens of the longest pairs."""
    e, longest = config.encoder, config.source_tokens + 2 * config.candidate_tokens
    layer = 512 * (12 * e.embed + 3 * e.mlp) * jnp.dtype(dtype).itemsize
    return Needs(held, layer + _heads(on_cpu) * 20 * 512 * longest)


def mean_wins(matrix: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, " n"]:
    """LLM-Blender's scores: score_i = sum over j of (C[i, j] - C[j, i]) / n, diagonal included."""
    return (matrix - matrix.T).mean(axis=1) if len(matrix) else np.zeros(0)


def pairrm(
    folder: str,
    compat: str = "per_row",
    dtype: str = "auto",
    batch: Annotated[int, BATCH] | None = None,
) -> PairRM:
    """Loads PairRM from a folder or a Hub id (`llm-blender/PairRM-hf`) onto all local devices.

    Args:
        folder: config.json, tokenizer.json and safetensors, in either published layout.
        compat: `per_row` cuts each row by itself, like the model's own recipe for transformers.
            `llm_blender` cuts as that package does: a candidate's budget depends on the longest
            source among the 8 rows of its group (4 in `compare` and `logits`), and `[SEP]` in a
            text becomes a space. A run never splits such a group.
        dtype: dtype of activations and matrices: `auto` (bfloat16, but float32 on CPU), `float32`
            or `bfloat16`. Softmax, norms and the head are always float32.
        batch: how many pairs of 512 tokens one device computes at once (fewer if they are longer).
            None takes what fits into memory, at most 16, or 2 on CPU, which has smaller caches.

    Raises:
        FeedbackError: a setting is unknown, or the tokenizer does not fit the model.
        SourceError: there is no such folder or Hub id, or no safetensors in it; pickled weights
            (`pytorch_model.bin`) are never read.
        UnsupportedModel: config.json describes another model.
        WeightsError: the tensors are not those of the model.
    """
    check_choice("pairrm", "compat", compat, COMPATS)
    on_cpu = jax.default_backend() == "cpu"
    kind = checked_dtype("pairrm", dtype, on_cpu)
    checked_batch("pairrm", batch, on_cpu)
    path = resolve(folder).path
    config = read_config(path)
    tokens = PairTokens(path, config)
    mesh = make_mesh((-1, 1, 1), own_devices())
    where = flatten_dict(shardings(abstract_params(config.encoder, config.tasks), mesh, TRAINING))
    params = load(
        path, config.encoder, config.tasks, dtype=kind,
        place=lambda path, x: jax.device_put(x, where[path]),
    )  # fmt: skip
    rows = batch_of("pairrm", batch, needs(config, kind, shard_bytes(params), on_cpu), on_cpu)
    return PairRM(config, params, tokens, mesh, compat=compat, dtype=kind, batch=rows, folder=path)


def _first_equal(texts: Sequence[Ids]) -> list[int]:
    """For each text (as token ids), the index of the first text that equals this text."""
    first: dict[bytes, int] = {}
    return [first.setdefault(ids.tobytes(), i) for i, ids in enumerate(texts)]
