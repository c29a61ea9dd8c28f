"""The stages of an iteration: each reads finished files and writes finished files.

    generate    responses/part-*.parquet   the policy's answers, as token ids
    rank        ranked.parquet             every candidate with its score, rank and role; meanwhile
                                           scores/, which keeps what was ranked already
    score       examples.parquet           what is trained on, with reference log-probabilities
    train       checkpoints/               the state of training
    export      model/                     a Hugging Face folder
    evaluate    heldout*.parquet           held-out answers of the new policy, pairs of the data; or, of
                pairs.parquet              a reward model, its rewards of held-out pairs

Nothing else passes between stages. What each may depend on is written down in `STAGES`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from selm_jax.config import as_dict, user_code_in
from selm_jax.feedback.ranker import folders_of
from selm_jax.parallel import multihost
from selm_jax.preferences.acquisition import MODEL_BASED
from selm_jax.run.run import Run
from selm_jax.shell import artifacts, jsonl
from selm_jax.shell.memory import release
from selm_jax.shell.store import Store
from selm_jax.shell.user_code import source_digest
from selm_jax.stages import asking
from selm_jax.stages.evaluate import evaluate, has_pairs
from selm_jax.stages.generate import Counts, generate
from selm_jax.stages.rank import rank
from selm_jax.stages.score import score
from selm_jax.stages.train import export, train_policy
from selm_jax.text.prompts import prompts_digest


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, and all that its outcome may depend on.

    `inputs` are digests by name; `settings` are the experiment's by dotted key; `outputs` are the
    files and folders of the iteration that it leaves and that must stay as they are. `shared` says
    whether another run with these inputs and settings would leave the same: then, in a sweep, one
    of them does the work. `goes_on_from` are folders of which a stopped one goes on; one that begins
    anew takes none of them. `scratch` are those that nobody reads once the outputs are there.
    """

    name: str
    work: Callable[[Run, int], Counts]
    inputs: Callable[[Run, int], Mapping[str, str]]
    settings: Callable[[Run, int], Mapping[str, Any]]
    outputs: Callable[[Run], tuple[str, ...]]
    shared: Callable[[Run], bool] = lambda run: True
    goes_on_from: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()

    def check(self, run: Run, t: int) -> None:
        """Raises ArtifactError if the stage was done with other inputs or settings than it has now."""
        record = artifacts.Stages(run.folder.iteration(t))
        if self.name in record.read():
            record.is_done(self.name, self.inputs(run, t), self.settings(run, t))

    def run(self, run: Run, t: int) -> bool:
        """Does the stage unless it is done; says whether it did.

        Of several processes all do the work; the first looks whether it is done, and records it.
        """
        multihost.stop_if_told()
        record = artifacts.Stages(run.folder.iteration(t))
        settings = self.settings(run, t)

        def begin() -> dict[str, str] | None:
            inputs = dict(self.inputs(run, t))
            if record.is_done(self.name, inputs, settings):
                self._check_log(run, t, record)
                return None
            if self.name not in record.read():  # it was taken out, to be done with other settings
                for name in self.goes_on_from:
                    artifacts.remove(run.folder.iteration(t) / name)
            _ = (
                run.folder.writers
            )  # there is work to do: what a tracker lacks is to be known before it
            record.begin(self.name, inputs, settings)
            return inputs

        outputs = {name: run.folder.iteration(t) / name for name in self.outputs(run)}
        if (inputs := multihost.on_first(begin)) is None:
            artifacts.wait_for(outputs.values())
            return False
        began = time.perf_counter()
        store = run.store if self.shared(run) else None
        key = Store.key(stage=self.name, iteration=t, inputs=inputs, settings=settings)
        found = None
        if store is not None:
            found = multihost.on_first(lambda: store.take(key, run.folder.iteration(t)))
        counts = self.work(run, t) if found is None else self._taken(run, t, found)
        multihost.barrier()
        artifacts.wait_for(outputs.values())
        seconds = time.perf_counter() - began

        def finish() -> None:
            if store is not None and found is None:
                about = {"counts": counts, "logged": run.folder.logged(self.name, t)}
                store.put(key, outputs, {"run": store.name_of(run.folder.path), **about})
            for name in self.scratch:  # a kill in the midst of it: what is gone is made once more
                artifacts.remove(run.folder.iteration(t) / name)
            # Killed between these two lines, a run takes its own work back.
            taken = (
                key if store and found and found["run"] != store.name_of(run.folder.path) else None
            )
            record.finish(
                self.name, inputs, settings, outputs, counts, seconds, taken,
                jsonl.digest(run.folder.logged(self.name, t)),
            )  # fmt: skip

        multihost.on_first(finish)
        release()  # or the next stage's peak would stand on this one's leavings
        run.say(self.name, t, counts, seconds, "" if found is None else f"as {found['run']}")
        return True

    def _check_log(self, run: Run, t: int, record: artifacts.Stages) -> None:
        """Raises ArtifactError if the lines that the stage has written into metrics.jsonl are others."""
        before = record.read()[self.name].get("logged")  # versions before this one kept none
        if before not in (None, jsonl.digest(run.folder.logged(self.name, t))):
            raise artifacts.ArtifactError(
                f"{run.folder.metrics_file}: its lines of stage {self.name!r}, iteration {t}, are not what "
                f"the stage wrote. Put the file back from a copy; or, to do the stage again, remove "
                f"{self.name!r} from {record.file}"
            )

    def _taken(self, run: Run, t: int, found: Mapping[str, Any]) -> Counts:
        """What the stage of another run left besides its outputs."""
        run.folder.forget(lambda line: (line["stage"], line["iteration"]) == (self.name, t))
        for line in found["logged"]:
            run.folder.log(
                self.name, t, {k: v for k, v in line.items() if k not in ("stage", "iteration")}
            )
        return found["counts"]


def _always(*names: str) -> Callable[[Run], tuple[str, ...]]:
    return lambda run: names


def _policy(run: Run, t: int) -> dict[str, str]:
    return {"policy": _digest_of_policy(run, t)}


def _reference(run: Run, t: int) -> dict[str, str]:
    return {"reference": _digest_of_policy(run, run.reference_number(t))}


def _digest_of_policy(run: Run, t: int) -> str:
    """Of the policy after iteration t, which is as its export has left it."""
    if t == 0:
        return artifacts.digest(run.policy(0))
    return artifacts.Stages(run.folder.iteration(t)).digest("model")


def _training(run: Run, t: int) -> dict[str, str]:
    """What the iteration's training was done with: its checkpoints are gone once they are exported."""
    done = artifacts.Stages(run.folder.iteration(t)).read().get("train", {})
    return {"training": Store.key(**{k: done.get(k) for k in ("inputs", "settings")})}


def _file(name: str) -> Callable[[Run, int], dict[str, str]]:
    return lambda run, t: {name: artifacts.Stages(run.folder.iteration(t)).digest(name)}


def _prompts(run: Run, t: int) -> dict[str, str]:
    return {"prompts": prompts_digest(run.prompts(t))}


def _heldout(run: Run, t: int) -> dict[str, str]:
    return {"heldout": prompts_digest(run.heldout), "start": _policy(run, 0)["policy"]}


def _asked_with(run: Run, t: int) -> dict[str, str]:
    """The models that a budget's acquisition looks at."""
    if run.experiment.feedback.acquisition not in MODEL_BASED:
        return {}
    return _policy(run, t - 1) | _reference(run, max(t - 1, 1))


def _ranking(run: Run, t: int) -> dict[str, str]:
    """The models that rank, if they are any, and the functions of the user's that do."""
    folders = folders_of(run.ranker)
    models = {f"ranker {n}": artifacts.digest(folder) for n, folder in enumerate(folders, 1)}
    return models | _code("feedback.ranker", "feedback.settings")(run, t)


def _chat(run: Run, t: int) -> dict[str, str]:
    """What makes ids of texts, in every iteration: tokenizer and template of the start model."""
    return {"chat": run.chat.digest}


def _code(*keys: str) -> Callable[[Run, int], dict[str, str]]:
    """The source of the functions of the user's that these keys, and those within them, name."""

    def of(run: Run, t: int) -> dict[str, str]:
        named = [(key, name) for key, name in user_code_in(run.experiment) if key.startswith(keys)]
        return {f"{key} {name}": source_digest(name) for key, name in named}

    return of


_pairing = _code("feedback.rule", "feedback.explore")


def _unscored(run: Run, t: int) -> dict[str, bool]:
    """An objective without a reference leaves its log-probabilities out."""
    return {"objective.reference_free": True} if run.task.reference_free else {}


def _all(*parts: Callable[[Run, int], Mapping[str, Any]]) -> Callable[[Run, int], dict[str, Any]]:
    return lambda run, t: {k: v for part in parts for k, v in part(run, t).items()}


def _pick(*keys: str) -> Callable[[Run, int], dict[str, Any]]:
    """Settings by dotted key; a key of a group stands for all its settings."""

    def of(run: Run, t: int) -> dict[str, Any]:
        tree, found = as_dict(run.experiment), {}
        settings = tree["feedback"]["settings"]
        tree["feedback"]["settings"] = _without(settings, _FREE_OF_RANKERS)
        if (server := tree["rollout"]["remote"]) is not None:
            tree["rollout"]["remote"] = server["engine"]  # how it is reached is free
        for key in keys:
            value: Any = tree
            for part in key.split("."):
                value = None if value is None else value[part]  # a group that is not there
            if isinstance(value, dict):
                found |= {f"{key}.{k}": v for k, v in value.items()}
            else:
                found[key] = value
        if "training.learning_rate" in found:
            found["training.learning_rate"] = run.experiment.learning_rate(t)
        if t == 1:  # both are the start model
            found.pop("training.reference_policy", None)
        if (
            found.get("rollout.filter", "") is None
        ):  # runs from before there was one are as they are
            del found["rollout.filter"]
        # Where and in which portions the work is done changes nothing about what comes out.
        return {k: v for k, v in found.items() if k not in _FREE}

    return of


def _rates(run: Run, t: int) -> dict[str, Any]:
    """A reward model is given other ids, and evaluated on other things. Said only where it is so:
    it is no setting of the experiment, but follows from its loss."""
    if not run.task.rates:
        return {}
    return {"objective.rates": True, "data.on_bad_row": run.experiment.data.on_bad_row}


def _without(tree: Any, keys: set[str]) -> Any:
    """Nested lists and dictionaries without these keys."""
    if isinstance(tree, dict):
        return {k: _without(v, keys) for k, v in tree.items() if k not in keys}
    return [_without(x, keys) for x in tree] if isinstance(tree, list) else tree


# How a judge is reached and what it may cost; how many processes run a rule.
_FREE_OF_RANKERS = {
    *("concurrency", "timeout", "retries", "backoff", "cache", "base_url", "key_env", "workers"),
    *("max_total_tokens", "max_cost", "price_prompt", "price_completion"),
}
_FREE = {
    *("rollout.slots", "rollout.prefill_rows", "feedback.prompts_per_part"),
    *("training.checkpoint_every", "training.checkpoints_kept"),
}
_TEMPLATE = ("text.template", "text.date", "text.special_tokens")
_ANSWERS = ("rollout.max_new_tokens", "rollout.max_prompt_tokens")
_SCORING = (
    *("training.row_length", "training.rows", "training.logprob_chunk"),
    *("training.parameter_dtype", "compute.dtype", "lora.base"),
)


def _of_evaluation(run: Run) -> tuple[str, ...]:
    if run.task.rates:
        return ("pairs.parquet",)
    return ("heldout.parquet", "heldout_pairs.parquet") if has_pairs(run) else ("heldout.parquet",)


STAGES = (
    Stage(
        "generate",
        generate,
        _all(_prompts, _chat, lambda run, t: _policy(run, t - 1), _code("rollout.filter")),
        _pick(
            *("seed", "candidates.greedy", "candidates.samples", "rollout"),
            *("training.parameter_dtype", "compute.dtype", *_TEMPLATE),
        ),
        _always("responses"),
        goes_on_from=("responses",),
    ),
    Stage(
        "rank",
        rank,
        _all(
            _prompts,
            _chat,
            _file("responses"),
            _asked_with,
            lambda run, t: {} if run.experiment.taught else _ranking(run, t) | _pairing(run, t),
        ),
        _all(
            _pick(
                *("seed", "candidates.dataset", "feedback", "text.layout", *_TEMPLATE),
                *("data.chosen_score", "data.rejected_score"),
            ),
            _rates,
        ),
        _always("ranked.parquet"),
        shared=lambda run: run.experiment.feedback.ranker != "human",  # people rank a run's answers
        goes_on_from=(asking.FOLDER,),
        scratch=(asking.FOLDER,),
    ),
    Stage(
        "score",
        score,
        _all(_prompts, _chat, _file("ranked.parquet"), _reference),
        _all(_pick("text", *_SCORING), _unscored, _rates),
        _always("examples.parquet"),
    ),
    Stage(
        "train",
        train_policy,
        _all(_file("examples.parquet"), _code("objective"), lambda run, t: _policy(run, t - 1)),
        _pick("seed", "objective", "training", "lora", "compute.dtype"),
        _always(),
        shared=lambda run: False,  # what it leaves is deleted once the export is complete
        goes_on_from=("checkpoints",),
    ),
    Stage(
        "export",
        export,
        _all(_file("examples.parquet"), lambda run, t: _policy(run, t - 1), _training),
        _pick(),
        lambda run: ("model",) if run.experiment.lora is None else ("model", "adapter"),
        shared=lambda run: False,  # the checkpoints it exports are no input that has a digest
    ),
)
EVALUATE = Stage(
    "evaluate",
    evaluate,
    _all(_heldout, _chat, _policy, lambda run, t: {} if run.task.rates else _ranking(run, t)),
    _all(
        _pick(
            *("seed", "feedback.ranker", "feedback.settings", "evaluation"),
            *(*_ANSWERS, *_TEMPLATE, *_SCORING),
        ),
        _rates,
    ),
    _of_evaluation,
)
