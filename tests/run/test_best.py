"""The best iteration by a metric: ties, missing values, and that deleting others is safe."""

import contextlib
import json
import math

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from selm_jax import iterate
from selm_jax.config import ConfigError, load
from selm_jax.parallel import multihost
from selm_jax.report.header import facts
from selm_jax.run.best import best_of, best_so_far
from selm_jax.run.held import check_best, drop_models
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts

VALUES = st.lists(st.sampled_from([None, math.nan, -1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1)


@given(VALUES)
def test_a_model_that_is_not_the_best_never_becomes_it_again(values):
    lines = {t: {"heldout/gain": value} for t, value in enumerate(values)}
    kept: set[int] = set()
    for t in lines:
        best = best_of("heldout/gain", {u: lines[u] for u in range(t + 1)})
        if best is not None:
            assert best.iteration in kept | {t}  # it has not been deleted before
        kept = {t} if best is None else {best.iteration, t}
    known = [v for v in values if v is not None and math.isfinite(v)]
    last = best_of("heldout/gain", lines)
    assert (last is None) == (not known)
    if last is not None:
        assert last.value == max(known) and last.iteration == values.index(max(known))


def test_a_loss_is_better_if_it_is_lower():
    lines = {1: {"heldout/loss": 0.6}, 2: {"heldout/loss": 0.4}, 3: {"heldout/loss": 0.4}}
    assert best_of("heldout/loss", lines).iteration == 2


@pytest.fixture
def run(tmp_path):
    """A run of four iterations whose models and evaluations are written by hand."""
    file = tiny.experiment(
        tmp_path, iterations=4, training__learning_rate=1e-3, keep_models="last",
        keep_best="heldout/reward_greedy", data__portions=4,
    )  # fmt: skip
    run = Run(load(file), Console(quiet=True))
    for t in range(1, 5):
        model = run.folder.model(t)
        model.mkdir(parents=True)
        (model / "weights").write_text(str(t))
        record = artifacts.Stages(model.parent)
        record.begin("export", {}, {})
        record.finish("export", {}, {}, {"model": model}, {}, 0.0)
    return run


def there(run):
    return [t for t in range(1, 5) if run.folder.model(t).exists()]


def test_the_best_model_stays_until_a_better_one_is_measured(run):
    rewards = [0.1, 0.5, 0.3, 0.5, 0.7]
    kept = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 3, 4], [4]]
    run.folder.log("evaluate", 0, {"heldout/reward_greedy": rewards[0]})
    for t in range(1, 5):
        run.folder.log("evaluate", t, {"heldout/reward_greedy": rewards[t]})
        drop_models(run, t)
        assert there(run) == kept[t - 1]
    for t in range(1, 5):  # a finished run that is started again
        drop_models(run, t)
    assert there(run) == [4]
    run.open()
    manifest = json.loads(run.folder.manifest_file.read_text())
    assert manifest["best"] == {
        "metric": "heldout/reward_greedy", "iteration": 4, "value": 0.7,
        "model": "iteration_4/model",
    }  # fmt: skip
    told = dict(facts({}, manifest))["Best model"]
    assert told == "iteration_4/model, by heldout/reward_greedy (0.70)"


def test_a_metric_that_is_not_measured_deletes_nothing(run):
    run.folder.log("evaluate", 1, {"heldout/kl": 1.0, "heldout/capability": -0.1})
    with pytest.raises(RunError, match=r"no metric heldout/reward_greedy.*\(heldout/capability\)"):
        drop_models(run, 1)
    assert there(run) == [1, 2, 3, 4]


@pytest.mark.parametrize("metric", ["heldout/accuracy", "heldout/gain", "heldout/capability"])
def test_an_unmeasured_metric_is_refused_before_anything_is_trained(tmp_path, monkeypatch, metric):
    """The start model has no gain and no capability, but what a gain needs."""
    run = Run(load(tiny.experiment(tmp_path, keep_best=metric)), Console(quiet=True))
    run.folder.path.mkdir()
    began = []
    monkeypatch.setattr(iterate, "held", lambda run: contextlib.nullcontext())
    monkeypatch.setattr(
        iterate, "measure", lambda run, t, _: run.folder.log("evaluate", t, {"heldout/kl": 0.0})
    )
    monkeypatch.setattr(iterate, "iteration", lambda run, t, _: began.append(t) or 1 / 0)
    trains = metric.endswith("capability")
    with pytest.raises((ZeroDivisionError, RunError)) as error:
        iterate.iterate(run)
    assert began == [1] * trains and error.errisinstance(RunError) != trains
    if metric == "heldout/gain":
        run.folder.log("evaluate", 0, {"heldout/reward_greedy": 0.5})
        check_best(run, 0)


def test_a_deleted_model_is_not_named_as_if_it_were_there(run):
    """`keep_best` was added when `keep_models: last` had deleted the model."""
    artifacts.Stages(run.folder.iteration(2)).let_go("export", "model")
    for t in (1, 2, 3):
        run.folder.log("evaluate", t, {"heldout/reward_greedy": float(t == 2)})
    best = best_so_far(run.experiment, run.folder, 3)
    assert best is not None and best.entry(run.folder)["model"] == "iteration_2/model (deleted)"
    run.folder.log("evaluate", 3, {"heldout/reward_greedy": 2.0})
    best = best_so_far(run.experiment, run.folder, 3)
    assert best is not None and best.entry(run.folder)["model"] == "iteration_3/model"


def test_a_run_opens_with_a_torn_line_of_metrics(run, monkeypatch):
    run.folder.log("evaluate", 1, {"heldout/reward_greedy": 0.5})
    whole = run.folder.metrics_file.read_text()
    torn = whole + '{"stage": "evalu'
    run.folder.metrics_file.write_text(torn)
    with monkeypatch.context() as patch:  # another process neither mends the file nor reads it
        patch.setattr(multihost, "is_first", lambda: False)
        run.open()
        assert run.folder.metrics_file.read_text() == torn
    run.open()
    assert run.folder.metrics_file.read_text() == whole
    assert json.loads(run.folder.manifest_file.read_text())["best"]["iteration"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__heldout": None}, "keep_best: it needs held-out data"),
        ({"keep_best": "heldout/kl"}, "keep_best: 'heldout/kl'; `heldout/MEASURE` or"),
        ({"keep_best": "heldout/safety/gain"}, "keep_best: .*names no set 'safety'"),
    ],
)
def test_metrics_that_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(tiny.experiment(tmp_path, **({"keep_best": "heldout/gain"} | changes)))
