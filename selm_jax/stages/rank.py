"""The stage `rank`: scores all candidates and picks the pairs (ranked.parquet)."""

from __future__ import annotations

from collections.abc import Sequence

from selm_jax.config import Experiment
from selm_jax.feedback.human import Human
from selm_jax.parallel import multihost
from selm_jax.preferences.acquisition import READ_MODEL
from selm_jax.preferences.examples import Example
from selm_jax.preferences.selection import by_settings
from selm_jax.run.inputs import LazyRanker, Model, StoredTable
from selm_jax.run.rows import prompt_ids
from selm_jax.run.task import Task
from selm_jax.stages import asking
from selm_jax.stages.ranking import budget, candidates, people
from selm_jax.stages.ranking.candidates import OfData, Pool
from selm_jax.stages.ranking.lengths import lengths_of
from selm_jax.stages.ranking.pairs import pairs
from selm_jax.stages.ranking.teach import taught
from selm_jax.stages.settings import SCORING, TEMPLATE
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step
from selm_jax.tables import ranked
from selm_jax.tables import responses as answers
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt

_OF_DATA = ("text.layout", "objective.rates", "data.on_bad_row", *TEMPLATE)


def _settings(e: Experiment, _task: Task) -> tuple[str, ...]:
    scoring = SCORING if e.feedback.acquisition in READ_MODEL else ()
    return ("seed", "candidates.dataset", "feedback", *_OF_DATA, *scoring)


@stage(
    leaves=("ranked.parquet",),
    settings=_settings,
    shared=lambda settings: settings.feedback.ranker != "human",  # people rank a run's answers
    goes_on_from=(asking.FOLDER,),
    scratch=(asking.FOLDER,),
)
def rank(
    step: Step,
    prompts: list[Prompt],
    responses: StoredTable,
    ranker: LazyRanker,
    chat: Chat,
    policy: Model | None = None,
    reference: Model | None = None,
) -> Counts:
    """Scores the candidates of the prompts; each prompt then gives a pair or is dropped.

    Args:
      policy, reference: the models that the acquisition of a budget uses: the policy that
        answered, and the reference that it was trained against.
    """
    pool = pool_of(step, prompts, responses, chat, policy, reference)
    answered = multihost.on_first(lambda: _answered(step, ranker, pool))
    found, told = asking.scores_in_parts(step, ranker, *pool.questions(answered))
    scores = dict(zip(answered, found, strict=True))
    feedback, seed = step.settings.feedback, (step.settings.seed, step.t)
    rows, report = pairs(pool, scores, by_settings(feedback), feedback.labels, seed=seed)
    of_ranker = {f"ranker/{key}": value for key, value in told.items()}
    return report.as_dict() | pool.cost | asking.unread(told) | of_ranker | _written(step, rows)


@stage(
    name="rank",
    leaves=("ranked.parquet",),
    settings=("data.rejected", "data.chosen_score", "data.rejected_score", *_OF_DATA),
)
def teach(step: Step, prompts: list[Prompt], chat: Chat) -> Counts:
    """Takes training pairs from the data set's answers, without asking a ranker."""
    rows, counts = taught(prompts, _of_data(step, chat), step.settings.data)
    return counts | _written(step, rows)


def _written(step: Step, rows: list[ranked.Row]) -> Counts:
    """Writes the candidates and the report of their lengths; returns this report."""
    if multihost.is_first():
        ranked.write(step.folder / "ranked.parquet", rows)
    lengths = lengths_of(rows)
    step.log.forget()
    if lengths:
        step.log(lengths)
    return lengths


def pool_of(
    step: Step,
    prompts: list[Prompt],
    responses: StoredTable,
    chat: Chat,
    policy: Model | None,
    reference: Model | None,
) -> Pool:
    """All candidates of an iteration, and the prompts that the ranker will be asked about."""
    feedback = step.settings.feedback
    of_data = _of_data(step, chat) if step.settings.candidates.dataset else None
    drawn = (row for file in answers.files(responses.path) for row in answers.read(file))
    pool = candidates.pool(prompts, drawn, of_data)
    if feedback.budget is None:
        return pool
    return budget.within(
        pool, feedback.budget, acquisition=feedback.acquisition,
        seed=(step.settings.seed, step.t), prompt_ids=lambda prompt: prompt_ids(chat, prompt),
        policy=_logps(step, policy), reference=_logps(step, reference),
        features=lambda examples: _features(step, policy, chat, examples),
    )  # fmt: skip


def _features(step: Step, policy: Model | None, chat: Chat, examples: Sequence[Example]):
    """The policy's last-layer features of every response of the examples."""
    assert policy is not None, "a design needs the policy"
    return step.programs.policy(policy.path, chat).features(examples)


def _logps(step: Step, model: Model | None) -> budget.Logps | None:
    """A function that scores examples with a model, which it loads when it is called."""
    if model is None:
        return None
    scorer, load = step.programs.scorer, step.programs.start_of
    return lambda examples: scorer.logps(load(model.path), examples)


def _answered(step: Step, ranker: LazyRanker, pool: Pool) -> list[int]:
    """The indices of the prompts that the ranker can score now.

    These are all chosen prompts, or if people rank, those that enough people have ranked.
    """
    human = ranker.ranker
    if not isinstance(human, Human):
        return list(pool.asked)
    run = step.folder.parent
    if human.wait:
        step.say(f"waiting for people to rank; `selm annotate {run}` shows them the questions")
    with step.bar(len(pool.asked), "prompts") as advance:
        batch = people.batch(step.run, step.t)
        return people.answered(human, run, batch, pool, lambda more: advance(more, 0))


def _of_data(step: Step, chat: Chat) -> OfData:
    layout, on_bad_row = step.settings.text.layout, step.settings.data.on_bad_row
    return OfData(chat, layout, step.task.candidate_ids, on_bad_row)
