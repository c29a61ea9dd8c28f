"""Compiled programs depend only on settings and sizes: they need neither a run nor a folder."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.models.families import from_hf
from selm_jax.models.quantize import dequantize
from selm_jax.objectives.losses import Logps
from selm_jax.objectives.roles import ROLES
from selm_jax.policy.sizes import least
from selm_jax.preferences.layouts import OneShape
from selm_jax.run import programs as programs_module
from selm_jax.run.data import Data
from selm_jax.run.devices import Devices
from selm_jax.run.programs import Programs, SharedPrograms, iteration_key
from selm_jax.run.run import Run
from selm_jax.run.task import Sizes, task_of

LORA = {"lora": {"rank": 2, "alpha": 4}}
QLORA = {"lora": {"rank": 2, "alpha": 4, "base": "nf4", "targets": "q_proj"}}


def programs_of(e, facts, sizes, stop_ids, devices=None) -> Programs:
    return Programs(e, task_of(e.objective), facts, sizes, stop_ids, Devices(e.compute, devices))


def same(one, other) -> None:
    """Both trees have the same shapes, dtypes and places."""

    def check(path, a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.sharding.is_equivalent_to(b.sharding, len(a.shape)), path

    jax.tree_util.tree_map_with_path(check, one, other)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"seed": 2, "output": "elsewhere", "data__limit": 3, "feedback__ties": "first"}, True),
        ({"training__learning_rate": 2e-5, "training__checkpoint_every": 7}, True),
        ({"seed": 2, **LORA}, True),
        ({"objective__beta": 0.2}, False),
        ({"rollout__slots": 7}, False),
        ({"training__clip": None}, False),
    ],
)
def test_runs_share_programs_if_all_that_they_are_built_from_is_equal(tmp_path, changes, shared):
    one = config.load(
        tiny.experiment(tmp_path, **{k: v for k, v in changes.items() if k == "lora"})
    )
    other = config.load(tiny.experiment(tmp_path, **changes))
    facts = from_hf(json.loads((tmp_path / "model/config.json").read_text()))
    compiled = SharedPrograms()
    found = [compiled.of(programs_of(e, facts, Sizes(10, 20), (0,))) for e in (one, other)]
    assert (found[0] is found[1]) == shared


def test_only_the_programs_that_were_used_last_are_kept(tmp_path):
    facts = from_hf(json.loads((tiny.make_model(tmp_path / "m") / "config.json").read_text()))
    e = config.load(tiny.experiment(tmp_path))
    compiled = SharedPrograms()

    def of(longest: int) -> Programs:
        return compiled.of(programs_of(e, facts, Sizes(10, longest), (0,)))

    first, second = of(20), of(21)
    for longest in range(22, 22 + programs_module.KEPT - 1):
        assert of(20) is first
        of(longest)
    assert of(20) is first and of(21) is not second


def test_what_runs_may_differ_in_is_read_by_no_program(tmp_path):
    e = config.load(tiny.experiment(tmp_path, **LORA))
    facts = from_hf(json.loads((tmp_path / "model/config.json").read_text()))
    read = {k: v for k, v in vars(e.training).items() if k not in programs_module.UNREAD}
    assert len(read) == len(vars(e.training)) - len(programs_module.UNREAD)
    parts = {k: v for k, v in vars(e).items() if k != "seed"} | {
        "training": SimpleNamespace(**read)
    }
    programs = Programs(
        SimpleNamespace(**parts), task_of(e.objective), facts, Sizes(16, 28), (0,),
        Devices(e.compute), least(e),
    )  # fmt: skip
    folder = tmp_path / "model"
    start = programs.start_of(folder)
    programs.fixed(start, iteration_key(0, 1), folder, folder)
    programs.trained(start, iteration_key(0, 1))
    programs.decoding(start)
    _ = programs.optimizer, programs.update, programs.scorer, programs.engine
    programs.policy(folder, None)


def test_each_iteration_is_trained_with_its_own_alpha(tmp_path, monkeypatch):
    """Equal values share an update, and so its compilation."""
    selm = {"loss": "selm", "beta": 0.1, "alpha": [0.02, 0, 0.02, 0]}
    e = config.load(
        tiny.experiment(tmp_path, iterations=4, objective=selm, training__learning_rate=1e-3)
    )
    facts = from_hf(json.loads((tmp_path / "model/config.json").read_text()))
    programs = programs_of(e, facts, Sizes(10, 20), (0,))
    monkeypatch.setattr(
        programs_module, "make_update", lambda decoder, objective, *_, **__: [objective]
    )
    updates = [programs.update_at(t) for t in range(1, 5)]
    assert updates[0] is updates[2] is programs.update and updates[1] is updates[3]
    ones, far = {role: np.ones(1) for role in ROLES}, {role: -5 * np.ones(1) for role in ROLES}
    terms = [of(Logps(far, ones, ones, ones))[1]["loss/optimism"] for (of,) in updates]
    np.testing.assert_allclose(np.ravel(terms), [-0.012, 0, -0.012, 0], rtol=1e-6)


@pytest.mark.parametrize("changes", [{}, LORA, QLORA], ids=["full", "lora", "nf4"])
def test_without_any_folder_they_are_those_of_the_run(tmp_path, changes):
    if changes is QLORA:
        pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")
    file = tiny.experiment(tmp_path, compute__fsdp=4, compute__tensor=2, **changes)
    e = config.load(file)
    run = Run(e, Console(quiet=True), devices=jax.devices())
    theirs = run.programs
    facts = from_hf(json.loads((tmp_path / "model/config.json").read_text()))
    loaded = theirs.start_of(run.policy(0).path)
    for part in tmp_path.iterdir():  # nothing is left that could be read
        shutil.rmtree(part) if part.is_dir() else part.unlink()

    alone = programs_of(e, facts, theirs.sizes, run.chat.stop_ids, jax.devices())
    assert dict(alone.devices.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert (alone.config, alone.engine) == (theirs.config, theirs.engine)
    same(alone.abstract_params, theirs.abstract_params)
    same(alone.abstract_trained, theirs.abstract_trained)
    assert alone.parameters == theirs.parameters == sum(x.size for x in _leaves(loaded))
    if not changes:  # and what is loaded is as the abstract trees say
        same(alone.abstract_params, loaded)
        same(alone.decoding(loaded), theirs.decoding(loaded))


def _leaves(params) -> list:
    return jax.tree.leaves(jax.eval_shape(dequantize, params))


@pytest.fixture
def models(tmp_path):
    """models(changes) -> programs, and the folders of two models that they can load."""
    other = tiny.make_model(tmp_path / "other", seed=1)

    def make(**changes):
        e = config.load(tiny.experiment(tmp_path, **changes))
        facts = from_hf(json.loads((other / "config.json").read_text()))
        return programs_of(e, facts, Sizes(16, 28), (0,)), tmp_path / "model", other

    return make


def equal(one, other) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_a_stored_reference_is_not_loaded(models):
    programs, policy, _ = models()
    start = programs.start_of(policy)
    assert programs.fixed(start, iteration_key(0, 1), policy, policy / "gone") == {
        "reference": None
    }


def test_a_live_reference_is_a_second_copy_where_the_updates_overwrite_the_first(models):
    programs, policy, other = models(training__reference="live")
    start = programs.start_of(policy)
    (again,) = programs.fixed(start, iteration_key(0, 1), policy, policy).values()
    assert equal(again, start)
    assert not any(a is b for a, b in zip(*map(jax.tree.leaves, (again, start)), strict=True))
    (second,) = programs.fixed(start, iteration_key(0, 2), policy, other).values()
    assert equal(second, programs.load(other)) and not equal(second, start)


def test_adapters_share_their_base_with_a_live_reference_in_the_same_folder(models):
    programs, policy, other = models(training__reference="live", **LORA)
    start = programs.start_of(policy)
    fixed = programs.fixed(start, iteration_key(0, 1), policy, policy)
    assert fixed["base"] is start and fixed["reference"] is start and fixed["key"] is None
    fixed = programs.fixed(start, iteration_key(0, 2), policy, other)
    assert fixed["base"] is start and equal(fixed["reference"], programs.load(other))


def test_adapters_and_their_dropout_are_drawn_anew_in_each_iteration(models):
    lora = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.1}}
    programs, policy, _ = models(**lora)
    start = programs.start_of(policy)
    drawn = [programs.trained(start, iteration_key(0, t)) for t in (1, 1, 2)]
    assert equal(drawn[0], drawn[1]) and not equal(drawn[0], drawn[2])
    keys = [
        jax.random.key_data(
            programs.fixed(start, iteration_key(0, t), policy, policy)["key"]
        ).tolist()
        for t in (1, 1, 2)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_the_scorer_has_the_settings_rows(models):
    programs, *_ = models(training__rows=3, training__row_length=72)
    assert programs.scorer.layout == OneShape(3, 72)
    assert programs.scorer.read is programs.update


def test_data_without_a_model_leaves_nothing_out_as_too_long(tmp_path):
    e = config.load(tiny.experiment(tmp_path, data__on_bad_row="drop", data__portions=2))
    lines = [{"prompt_id": f"p{i}", "prompt": "x" * (80 if i == 1 else 8)} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with_model, without = Run(e, Console(quiet=True)).data, Data(e, task_of(e.objective), None)
    assert [p.id for p in without.prompts(1)] == [f"p{i}" for i in range(8)]
    assert [p.id for p in with_model.prompts(1)] == [f"p{i}" for i in range(8) if i != 1]
    with pytest.raises(AssertionError, match="without a model"):
        _ = without.longest_prompt
