"""rank: every candidate with its score, rank and role (ranked.parquet)."""

from __future__ import annotations

from pathlib import Path

from selm_jax.annotate.store import AnnotationError, Annotations
from selm_jax.feedback.human import Human
from selm_jax.parallel import multihost
from selm_jax.run.run import Run
from selm_jax.stages.asking import scores_in_parts, unread
from selm_jax.stages.generate import Counts, response_files
from selm_jax.stages.ranking import budget, candidates, people
from selm_jax.stages.ranking.candidates import OfData, Pool
from selm_jax.stages.ranking.pairs import pairs
from selm_jax.stages.ranking.teach import taught
from selm_jax.tables import ranked, responses


def rank(run: Run, t: int) -> Counts:
    """The ranker scores the candidates of the prompts that it is asked about; each becomes a pair
    or a counted drop. Answers of the data that are taught as they are need no ranker."""
    e = run.experiment
    if e.taught:
        rows, counts = taught(run.prompts(t), _of_data(run), e.data)
    else:
        pool = pool_of(run, t)
        answered = multihost.on_first(lambda: _answered(run, t, pool))
        found, told = scores_in_parts(run, t, *pool.questions(answered))
        scores = dict(zip(answered, found, strict=True))
        rows, report = pairs(pool, scores, run.select, e.feedback.labels, seed=(e.seed, t))
        of_ranker = {f"ranker/{key}": value for key, value in told.items()}
        counts = report.as_dict() | pool.cost | unread(told) | of_ranker
    if multihost.is_first():
        ranked.write(run.folder.iteration(t) / "ranked.parquet", rows)
    return counts


def pool_of(run: Run, t: int) -> Pool:
    """Every candidate of an iteration, and which prompts are to be asked about.

    The policy of a budget's acquisition is the one that generated, policy t-1; its own reference is
    that of iteration t-1. In iteration 1 both are the start model, and the choice is random.
    """
    e, f = run.experiment, run.experiment.feedback
    drawn = (row for file in response_files(run, t) for row in responses.read(file))
    pool = candidates.pool(run.prompts(t), drawn, _of_data(run) if e.candidates.dataset else None)
    if f.budget is None:
        return pool

    def logps(model: Path) -> budget.Logps:
        return lambda examples: run.programs.scorer.logps(run.programs.start_of(model), examples)

    compared = f.acquisition == "reward_gap" and t > 1
    return budget.within(
        pool, f.budget, acquisition=f.acquisition, seed=(e.seed, t), prompt_ids=run.data.prompt_ids,
        policy=logps(run.policy(t - 1)),
        reference=logps(run.reference(t - 1)) if compared else None,
    )  # fmt: skip


def put_questions(run: Run, t: int, minimum: int | None = None) -> tuple[Annotations, str]:
    """Puts an iteration's questions where people are asked them; see `people.put`.

    Returns:
      the store, and the name of the batch.

    Raises:
      AnnotationError: there is nothing to rank, or the ranker waits for another minimum.
    """
    if run.experiment.taught:
        raise AnnotationError(
            f"{run.folder.path}: the data set's answers are taught as they are; there is nothing to rank"
        )
    batch = _batch(run, t)
    feedback = run.experiment.feedback
    return people.put(run.folder.path, feedback, batch, pool_of(run, t), minimum), batch


def _batch(run: Run, t: int) -> str:
    return f"{run.folder.name}/iteration_{t}"


def _answered(run: Run, t: int, pool: Pool) -> list[int]:
    """The prompts that the ranker can score: all that are asked about, but for people."""
    ranker = run.ranker
    if not isinstance(ranker, Human):
        return list(pool.asked)
    if ranker.wait:
        run.console.print(
            f"iteration {t}  rank: waits for people; `selm annotate {run.folder.path}` asks them",
            soft_wrap=True,
        )
    with run.bar(f"iteration {t}  rank", len(pool.asked), "prompts") as advance:
        batch = _batch(run, t)
        return people.answered(ranker, run.folder.path, batch, pool, lambda more: advance(more, 0))


def _of_data(run: Run) -> OfData:
    e = run.experiment
    return OfData(run.chat, e.text.layout, run.task.rates, e.data.on_bad_row)
