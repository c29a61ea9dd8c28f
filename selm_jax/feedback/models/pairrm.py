"""PairRM, the ranker of the SELM paper: reads two responses side by side, says which is better.

Model: Jiang et al. 2023 (LLM-Blender, arXiv 2306.02561). A pair is read as three segments

    [CLS] <|source|> S [SEP]  [CLS] <|candidate1|> A [SEP]  [CLS] <|candidate2|> B [SEP]

and gives logit(A, B), above 0 where A is better. It is not antisymmetric: the order counts. So
scores compare all candidates of a prompt in both orders, score_i = mean over j of logit(i, j) -
logit(j, i).

A source longer than its budget is cut at the end, and so is a candidate; each candidate has 412
tokens, and half of what the source leaves of its 1224. Cut texts are counted (`PairRM.report`).
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
    check_choice,
    checked_batch,
    checked_dtype,
)
from selm_jax.feedback.ranker import FeedbackError, Question, check_questions, check_scores
from selm_jax.models.deberta import PairScorer, Params, abstract_params
from selm_jax.parallel.alone import own_devices
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.preferences.layouts import Part, parts
from selm_jax.preferences.selection import ranks
from selm_jax.training.scoring import one_ahead
from selm_jax.weights.deberta import PairRMConfig, load, read_config
from selm_jax.weights.sources import resolve

COMPATS = ("per_row", "llm_blender")
MODES = ("[A,B]+[B,A]", "[A,B]", "[B,A]")

# LLM-Blender's default batches, by which its budgets depend on the rows beside a row.
_BLENDER_RANK, _BLENDER_COMPARE = 8, 4

_COUNTED = ("sources", "sources_cut", "candidates", "candidates_cut", "comparisons")


class Comparison(NamedTuple):
    """Candidates of row `row` to be read side by side, in this order."""

    row: int
    first: int
    second: int


class _Row(NamedTuple):
    """A source and its candidates as token ids with their special tokens, cut to their budgets."""

    source: Ids
    candidates: list[Ids]

    def length(self, pair: Comparison) -> int:
        first, second = self.candidates[pair.first], self.candidates[pair.second]
        return len(self.source) + len(first) + len(second)


class PairRM:
    """PairRM as a ranker (see `ranker.Ranker`), and its comparisons by themselves."""

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
        batch: int = 16,
        folder: Path | None = None,
    ):
        """`pairrm` builds one from a folder and says what the settings mean.

        Args:
            params: of `PairScorer`, replicated on the mesh.
            mesh: batches are cut over its axis `data`.
            folder: where they come from.
        """
        self.folders = () if folder is None else (folder,)
        self.config, self._params, self._tokens, self._mesh = config, params, tokens, mesh
        self._compat, self._batch = compat, batch
        self.together = _BLENDER_RANK if compat == "llm_blender" else 1
        self._counts: Counter[str] = Counter()
        self._forward = program(config, dtype, on_cpu=jax.default_backend() == "cpu")

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """One float64 array `[candidates]` per question: n (n - 1) comparisons each.

        What is read: the text of the last user turn. A question with earlier answers is put in
        LLM-Blender's form for conversations (`conversation`). A system message has no place in
        either and is left out, as in the authors' own rankings.

        Raises:
            FeedbackError: questions and candidates do not belong together, turns that do not take
                turns, or a score that is not finite.
        """
        check_questions(self.name, questions, candidates)
        self._counts.clear()
        texts = [conversation(q, each) for q, each in zip(questions, candidates, strict=True)]
        matrices = self.matrices([source for source, _ in texts], [each for _, each in texts])
        return check_scores(self.name, questions, candidates, [mean_wins(m) for m in matrices])

    def report(self) -> dict[str, float]:
        """Counts of the last `scores` (and of comparisons since): texts read, texts cut, forwards.

        Keys: `sources`, `sources_cut`, `candidates`, `candidates_cut`, `comparisons`.
        """
        return {key: self._counts[key] for key in _COUNTED}

    def matrices(
        self, sources: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, "n n"]]:
        """Per source all logits: entry (i, j) is logit(i, j), 0 on the diagonal."""
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
        """Per source the candidates' ranks from 1, the best; equal scores share the better rank."""
        return [ranks(mean_wins(m)) for m in self.matrices(sources, candidates)]

    def logits(self, pairs: Sequence[tuple[str, str, str]]) -> Float64[np.ndarray, " pairs"]:
        """logit(A, B) of each (source, A, B), above 0 where A is better."""
        return self.compare(*(zip(*pairs, strict=True) if pairs else ((), (), ())), mode="[A,B]")

    def compare(
        self,
        sources: Iterable[str],
        first: Iterable[str],
        second: Iterable[str],
        mode: str = "[A,B]+[B,A]",
    ) -> Float64[np.ndarray, " pairs"]:
        """Compares A (`first`) with B (`second`).

        Args:
            mode: `[A,B]+[B,A]` gives logit(A, B) - logit(B, A), above 0 where A is better;
                `[A,B]` gives logit(A, B); `[B,A]` gives logit(B, A), above 0 where B is better.

        Raises:
            FeedbackError: unknown mode.
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
        """Per source the index of the candidate that is left after one bubble pass.

        n - 1 comparisons in both orders, against n (n - 1) / 2 for `ranks`. The winner so far
        meets the next candidate; the next one wins a tie, as in LLM-Blender. Preferences that go in
        a circle make the outcome depend on the order.

        Args:
            seed: of the order of each source's candidates; None is the order given.

        Raises:
            FeedbackError: a source without candidates.
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
        """`beside`: rows that share their candidates' budget under `compat: llm_blender`."""
        if len(sources) != len(candidates):
            raise FeedbackError(
                f"pairrm: found {len(sources)} sources and candidates for {len(candidates)}; "
                "expected as many."
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
        """Each comparison's logit. Equal texts are compared once, so their scores are equal."""
        same = [_first_equal(row.candidates) for row in rows]
        meant = [Comparison(r, same[r][i], same[r][j]) for r, i, j in pairs]
        todo = sorted(set(meant), key=lambda p: (-rows[p.row].length(p), p))
        self._counts["comparisons"] += len(todo)
        lengths = [rows[pair.row].length(pair) for pair in todo]
        these = parts(lengths, self._mesh.shape["data"], self._batch)
        logit: dict[Comparison, float] = {}
        for part, values in one_ahead(these, lambda part: self._run(rows, todo, part)):
            logit.update(zip((todo[n] for n in part.items), values.tolist(), strict=False))
        return np.array([logit[pair] for pair in meant], np.float64)

    def _run(self, rows: Sequence[_Row], todo: Sequence[Comparison], part: Part) -> jax.Array:
        """The logits of a part, then of rows that fill up; [rows], on the devices."""
        tokens = np.full((part.rows, part.time), self._tokens.pad, np.int32)
        lengths = np.ones(part.rows, np.int32)
        prefixes = np.zeros((part.rows, 3), np.int32)
        for n, (r, i, j) in enumerate(todo[part.items.start : part.items.stop]):
            segments = (rows[r].source, rows[r].candidates[i], rows[r].candidates[j])
            starts = np.cumsum([0, *map(len, segments)])
            lengths[n], prefixes[n] = starts[-1], starts[:3] + 1  # behind each [CLS]
            tokens[n, : starts[-1]] = np.concatenate(segments)
            tokens[n, prefixes[n]] = self._tokens.prefix_ids
        return self._forward(self._params, *place_rows((tokens, lengths, prefixes), self._mesh))


def program(config: PairRMConfig, dtype: Any, *, on_cpu: bool) -> Any:
    """The jitted `(params, tokens, lengths, prefixes) -> logits`; see `PairScorer`."""
    # On CPU one head's scores stay in the cache; four fill an accelerator well.
    scorer = PairScorer(config.encoder, config.tasks, dtype, 1 if on_cpu else 4)
    return jax.jit(lambda params, *inputs: scorer.apply({"params": params}, *inputs))


def mean_wins(matrix: Float64[np.ndarray, "n n"]) -> Float64[np.ndarray, " n"]:
    """score_i = sum over j of (C[i, j] - C[j, i]) / n: LLM-Blender's, the diagonal in the mean."""
    return (matrix - matrix.T).mean(axis=1) if len(matrix) else np.zeros(0)


def pairrm(
    folder: str,
    compat: str = "per_row",
    dtype: str = "auto",
    batch: Annotated[int, BATCH] | None = None,
) -> PairRM:
    """PairRM from a folder or a Hub id (`llm-blender/PairRM-hf`), on all devices of this process.

    Args:
        folder: config.json, tokenizer.json and safetensors, in either published layout.
        compat: `per_row` cuts each row by itself, as the model's own recipe for transformers does.
            `llm_blender` cuts as that package does: a candidate's budget depends on the longest
            source among the 8 rows (4 in `compare` and `logits`) that were given together, which
            the parts of a run's ranking do not cut, and `[SEP]` in a text becomes a space.
        dtype: of activations and matrices: `auto` (bfloat16, but float32 on CPU), `float32` or
            `bfloat16`. Softmax, norms and the head are float32 always.
        batch: pairs of 512 tokens that one device computes at once; longer ones go together in
            smaller number. None is 16, but 2 on CPU, whose caches hold no more.

    Raises:
        FeedbackError: an unknown setting, or a tokenizer that does not fit.
        SourceError: no such folder or Hub id, or no safetensors in it; pickled weights
            (`pytorch_model.bin`) are never read.
        UnsupportedModel: config.json describes another model.
        WeightsError: the tensors are not those of the model.
    """
    check_choice("pairrm", "compat", compat, COMPATS)
    on_cpu = jax.default_backend() == "cpu"
    kind, batch = checked_dtype("pairrm", dtype, on_cpu), checked_batch("pairrm", batch, on_cpu)
    path = resolve(folder).path
    config = read_config(path)
    tokens = PairTokens(path, config)
    mesh = make_mesh((-1, 1, 1), own_devices())
    where = flatten_dict(shardings(abstract_params(config.encoder, config.tasks), mesh, TRAINING))
    params = load(
        path, config.encoder, config.tasks, dtype=kind,
        place=lambda path, x: jax.device_put(x, where[path]),
    )  # fmt: skip
    return PairRM(config, params, tokens, mesh, compat=compat, dtype=kind, batch=batch, folder=path)


def _first_equal(texts: Sequence[Ids]) -> list[int]:
    """For each text the index of the first that equals it."""
    first: dict[bytes, int] = {}
    return [first.setdefault(ids.tobytes(), i) for i, ids in enumerate(texts)]
