"""Algorithm 1 of arXiv 2405.19332: the policy answers, is trained, and becomes the next reference.

Each call is a stage, which runs only once, so a stopped run continues where it stopped.
"""

from __future__ import annotations

from dataclasses import replace

from selm_jax.run.held import check_best, drop_models, held, tell_time_left, write_report
from selm_jax.run.inputs import HeldoutSets, Model, StoredTable
from selm_jax.run.run import Run
from selm_jax.run.wanted import Wanted
from selm_jax.shell import artifacts
from selm_jax.shell import mirror as mirrors
from selm_jax.stages.evaluate import evaluate, evaluate_pairs
from selm_jax.stages.export import export
from selm_jax.stages.generate import generate
from selm_jax.stages.rank import rank, teach
from selm_jax.stages.score import score
from selm_jax.stages.train import train


def iterate(run: Run) -> None:
    """Runs all unfinished stages of an experiment, then writes the report."""
    run.wanted = Wanted()  # all stages
    with held(run):
        policy = run.start
        measure(run, 0, policy)
        check_best(run, 0)
        for t in run.iterations:
            policy = iteration(run, t, policy)
            run.write_manifest()
            drop_models(run, t)
            tell_time_left(run, t)
        if not run.wanted.worked:
            run.console.print(f"{mirrors.named(run.folder.path)}: every stage is done already")
        write_report(run)


def iteration(run: Run, t: int, policy: Model) -> Model:
    """Runs all stages of iteration t on a policy; returns the trained policy."""
    reference = run.start if run.fixed_reference else policy
    prompts = run.prompts(t)
    mixed = run.experiment.rollout.mixture is not None
    other = run.before(t) if mixed else None  # None in iteration 1: the policy mixed with itself
    responses = generate(run, t, policy, prompts, run.chat, other)  # responses/
    if run.experiment.taught:
        ranked = teach(run, t, prompts, run.chat)  # ranked.parquet
    else:
        ranker, looked_at = run.ranker_of(t, policy), run.looked_at(t, policy)
        ranked = rank(run, t, prompts, responses, ranker, run.chat, *looked_at)  # ranked.parquet
    sampled = run.sampled(responses, policy, reference)
    start = run.start if run.task.start_share and reference != run.start else None  # INPO
    examples = score(
        run, t, prompts, ranked, reference, run.chat, sampled, start
    )  # examples.parquet
    training = train(run, t, policy, examples, reference)  # checkpoints/
    policy = export(run, t, policy, run.start, training, run.card(t))  # model/
    measure(run, t, policy)
    run.complete_card(t)
    return policy


def measure(run: Run, t: int, policy: Model) -> StoredTable:
    """Evaluates a policy on held-out prompts, or a reward model on held-out pairs."""
    first = None if t == 0 else run.folder.iteration(0)
    sets = HeldoutSets(run.data.heldout_sets, first)
    if not run.task.answers:
        return evaluate_pairs(run, t, policy, run.heldout, run.chat, replace(sets, first=None))
    answers = None if first is None else StoredTable(first, "heldout.parquet")
    scores = None if first is None else StoredTable(first, "tasks.parquet")
    return evaluate(
        run, t, policy, run.start, run.heldout, run.ranker, run.chat, answers, sets,
        run.data.tasks(scores),
    )  # fmt: skip


def run_stage(run: Run, name: str, t: int) -> None:
    """Runs one stage of iteration t; all earlier stages must be done."""
    run.wanted = Wanted(name, t)
    with held(run):
        try:
            if t == 0:
                measure(run, 0, run.start)
            else:
                iteration(run, t, run.policy(t - 1))
            run.write_manifest()
        except FileNotFoundError as e:
            raise artifacts.ArtifactError(
                f"iteration {t}, stage {name!r}: {e.filename or e} is missing. "
                "Run the earlier stages first"
            ) from e
        if (name, t) not in run.wanted.did:
            run.console.print(
                f"iteration {t}  {name}: nothing to do, because there are no held-out prompts"
            )
        elif not run.wanted.worked:
            run.console.print(f"iteration {t}  {name}: done already")
