"""The laboratory's acquisition rules against those of the pipeline, and against slow searches."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from selm_jax.config.kinds import Acquisition
from selm_jax.lab import acquire, command
from selm_jax.lab.algorithms import Length
from selm_jax.lab.compare import Place
from selm_jax.lab.worlds import LANDSCAPES, WorldShape
from selm_jax.preferences import acquisition
from selm_jax.preferences.acquisition import Prospect

TINY = WorldShape(prompts=3, responses=16, dimension=4)
SHORT = Length(rounds=3, queries=2, steps=3)


@pytest.fixture
def pool(world):
    w = world(dimension=4, prompts=3, responses=8)
    theta = jax.random.normal(jax.random.key(1), (4,))
    keys = jax.random.split(jax.random.key(2), 3)
    return acquire.drawn(keys, w, w.log_policy(theta), w.log_reference, 12)


def prospects(pool):
    for x, y, other in zip(pool.prompt, pool.first, pool.second, strict=True):
        tables = (np.asarray(t[x, jnp.array([y, other])]) for t in pool[:2])
        yield Prospect(*tables, np.array([True, False]))


@pytest.mark.parametrize("name", ["reward_gap", "entropy"])
def test_rules_of_one_value_are_those_of_the_pipeline(pool, name):
    values = [acquisition.MODEL_BASED[name](each) for each in prospects(pool)]
    found = getattr(acquire, name)(pool, 5)
    # A pair may be in the pool twice, so values are compared, and not places.
    expected = acquisition.best(values, 5, np.random.default_rng(0))
    np.testing.assert_allclose(
        sorted(values[i] for i in found), sorted(values[i] for i in expected), rtol=1e-9
    )
    assert len(set(found.tolist())) == 5


def test_the_design_is_that_of_the_pipeline(pool):
    x = np.asarray(pool.difference)
    found = acquire.d_optimal(pool, 6)
    expected = acquisition.d_optimal(x, 6, np.random.default_rng(3))
    np.testing.assert_allclose(information(x, found), information(x, expected), rtol=1e-9)


def test_each_step_of_the_design_raises_the_determinant_most(pool):
    """The slow form: every pair that is left is tried, by its whole determinant."""
    x = np.asarray(pool.difference)
    asked: list[int] = []
    for i in acquire.d_optimal(pool, 6).tolist():
        tried = {j: information(x, [*asked, j]) for j in range(len(x)) if j not in asked}
        assert i not in asked and tried[i] == pytest.approx(max(tried.values()), rel=1e-9)
        asked.append(i)


def information(x, asked) -> float:
    unit = x / np.sqrt(np.mean(x * x))
    return np.linalg.slogdet(np.eye(x.shape[1]) + unit[list(asked)].T @ unit[list(asked)])[1]


def test_without_an_opinion_a_rule_asks_about_the_first_pairs(pool):
    same = pool._replace(log_policy=pool.log_reference)
    assert acquire.reward_gap(same, 4).tolist() == acquire.random(same, 4).tolist() == [0, 1, 2, 3]
    nothing = pool._replace(difference=jnp.zeros_like(pool.difference))
    assert acquire.d_optimal(nothing, 4).tolist() == [0, 1, 2, 3]


def test_the_second_control_takes_the_first_pairs_of_two_different_responses(pool):
    first = pool.second.at[jnp.array([1, 4, 5])].add(1)  # only these are different
    found = acquire.random_distinct(pool._replace(first=first), 5)
    assert found.tolist() == [1, 4, 5, 0, 2]
    every = [i for i in range(12) if pool.first[i] != pool.second[i]]
    assert acquire.random_distinct(pool, len(every)).tolist() == every


def test_a_table_has_a_feature_for_each_response_to_each_prompt(world):
    w = world(dimension=None, prompts=2, responses=4)
    keys = jax.random.split(jax.random.key(0), 3)
    pool = acquire.drawn(keys, w, w.log_reference, w.log_reference, 9)
    for row, x, y, other in zip(*pool[5:], *pool[2:5], strict=True):
        expected = np.zeros((2, 4))
        expected[x, y] += 1
        expected[x, other] -= 1
        np.testing.assert_array_equal(row, expected.ravel())


def test_the_pool_has_the_samplers_distribution(world):
    w = world(dimension=None, prompts=2, responses=4, coverage=0.5)
    policy = jax.nn.log_softmax(jax.random.normal(jax.random.key(5), (2, 4)))
    n = 20_000
    pool = acquire.drawn(
        jax.random.split(jax.random.key(1), 3), w, policy, w.log_reference, n
    )._replace(difference=jnp.zeros(0))
    found = np.zeros((2, 4, 4))
    np.add.at(found, (pool.prompt, pool.first, pool.second), 1 / n)
    expected = 0.5 * jnp.exp(policy)[:, :, None] * jnp.exp(w.log_reference)[:, None, :]
    np.testing.assert_allclose(found, expected, atol=4 * (0.25 / n) ** 0.5)


def test_every_acquisition_of_the_pipeline_is_a_rule():
    named = {name for part in Acquisition.__args__ for name in getattr(part, "__args__", (part,))}
    assert named == set(acquire.NAMES) - {"random_distinct"}


def tiny(seeds=6):
    places = [Place("needle", dimension=4), Place("cyclic", "moving", dimension=4, moving=True)]
    found = acquire.compare(seeds, 0, shape=TINY, length=SHORT, size=8, places=places)
    return list(itertools.chain(*found))


def test_two_runs_are_equal_and_the_rules_differ():
    once = tiny()
    assert json.dumps(once) == json.dumps(tiny())
    pairs = [(rule, "random") for rule in acquire.NAMES[1:]]
    pairs += [(rule, "random_distinct") for rule in acquire.NAMES[2:]]
    assert [(r["landscape"], r["arm"], r["control"]) for r in once] == [
        (place, *pair) for place in ("needle", "cyclic") for pair in pairs
    ]
    assert len({r["difference"] for r in once}) == len(once)


def test_each_control_has_a_family_of_tests():
    records = [
        {"control": control.__name__, "p": p} for control in acquire.CONTROLS for p in (0.01, 0.04)
    ]
    assert [r["p_holm"] for r in acquire.correct(records)] == pytest.approx([0.02, 0.04] * 2)


def test_a_pool_as_large_as_the_budget_leaves_no_choice():
    """All rules then label the same pairs, in another order, with other noise for each."""
    places = [Place("needle", temperature=0.0, dimension=4)]
    (found,) = acquire.compare(8, 0, shape=TINY, length=SHORT, size=2, places=places)
    for r in found:
        assert r["difference"] == pytest.approx(0, abs=2e-4 * r["base"])


def test_the_command_writes_the_table_the_page_and_the_numbers(monkeypatch, tmp_path):
    def compare(seeds, seed):
        rng = np.random.default_rng(seed)
        base = rng.normal(3, 0.2, (1, seeds)).repeat(2, 0)
        for landscape in LANDSCAPES:
            gaps = {"random_distinct": 0.0, "reward_gap": -1.0, "entropy": 0.5, "d_optimal": 0.0}
            yield [
                acquire._record(
                    name, control, Place(landscape),
                    (base + gaps[name] / 2 + rng.normal(0, 0.01, seeds)).T, base.T,
                )
                for name, control in acquire.COMPARED
            ]  # fmt: skip

    monkeypatch.setattr(acquire, "compare", compare)
    told = CliRunner().invoke(
        command.app, ["acquire", "--seeds", "16", "--out", str(tmp_path)], catch_exceptions=False
    )
    lines = (tmp_path / "lab_acquire.md").read_text().splitlines()
    columns = "| two_peaks | needle | smooth | random | wrong | cyclic | all |"
    assert lines[0] == f"| against `random` {columns}" and lines[0] in told.output
    assert lines[2].startswith("| `random_distinct` |") and lines[2].endswith("| 0 / 0 |")
    assert lines[3].startswith("| `reward_gap` | −") and lines[3].endswith("| 6 / 0 |")
    assert lines[4].endswith("| 0 / 6 |") and lines[6] == ""
    assert lines[7] == f"| against `random_distinct` {columns}"
    assert lines[9].startswith("| `reward_gap` | −") and lines[9].endswith("| 6 / 0 |")
    assert len(json.loads((tmp_path / "lab_acquire.json").read_text())) == 6 * 7
    page = (tmp_path / "lab_acquire.html").read_text()
    assert "reward_gap, compared with random prompts: less regret in" in page
    assert "compared with random prompts with two different responses: less regret in" in page
