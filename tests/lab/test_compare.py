"""The comparison of all methods: equal bytes, choice of strengths, and what the page says."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from selm_jax.lab import command, compare, compare_page, contest, stats
from selm_jax.lab.algorithms import Length
from selm_jax.lab.arms import ARMS
from selm_jax.lab.compare import Found, Place, Task
from selm_jax.lab.worlds import LANDSCAPES, WorldShape

DOCS = Path(__file__).parents[2] / "docs"


def record(effect, arm, landscape, condition, gap, strength=0.1, seeds=16):
    base = np.random.default_rng(len(landscape + condition)).normal(3, 0.2, seeds)
    noise = np.random.default_rng(9).normal(0, 0.1, seeds)
    place = {"landscape": landscape, "condition": condition}
    compared = stats.compare(base + gap + noise, base)
    return (
        {"effect": effect, "arm": arm} | place | {"strength": strength} | compared | {"last": gap}
    )


def records():
    """SELM is better with the needle and worse elsewhere; uniform has no strength."""
    conditions = ("base", "table")
    made = []
    for effect in ("best", "one", "data", "fit"):
        arms = ("selm", "uniform") if effect == "best" else ("selm",)
        made += stats.correct([
            record(effect, arm, l, c, (-1.0 if l == "needle" else 0.5) * (arm == "selm"))
            for arm in arms for l, c in itertools.product(("two_peaks", "needle"), conditions)
        ])  # fmt: skip
    return made


def test_the_table_counts_places_and_marks_the_base_condition():
    columns, (selm, uniform) = compare_page.rows(records())
    assert columns[:3] == ["method", "two_peaks", "needle"]
    found = dict(zip(columns, selm, strict=True))
    assert found["needle"].startswith("−3") and found["needle"].endswith(" %*, 2 / 0")
    assert found["two_peaks"].startswith("+1") and found["two_peaks"].endswith(" %*, 0 / 2")
    assert found["all"] == "2 / 2" and found["one strength for all"] == "0.1: 2 / 2"
    assert found["the data alone"] == "2 / 2"
    assert uniform[0] == "uniform" and uniform[3] == "0 / 0" and uniform[-2] == "all of it"
    assert compare_page.where(records(), "selm") == ("needle 2", "two_peaks 2")
    assert compare_page.where(records(), "uniform") == ("nowhere", "nowhere")
    assert compare_page.where(records(), "exo_pair") == ("–", "–")


def test_the_page_says_what_the_table_says(monkeypatch, tmp_path):
    slope = {"slope": 0.5, "slope_low": 0.4, "slope_high": 0.6}
    found = Found(records(), [{"arm": "selm", "landscape": "needle"} | slope])
    monkeypatch.setattr(compare, "compare", lambda *_, **__: iter(["programs compiled", found]))
    told = CliRunner().invoke(
        command.app, ["compare", "--seeds", "16", "--out", str(tmp_path)], catch_exceptions=False
    )
    text = (tmp_path / "lab_compare.md").read_text()
    assert compare_page.markdown(json.loads((tmp_path / "lab_compare.json").read_text())) in text
    assert text.splitlines()[0] in told.output
    caption = text.splitlines()[-1]
    assert caption.startswith("selm lab compare --seeds 16 --seed 0; 16 seeds per setting; ")
    assert "selm_jax 0" in caption
    page = (tmp_path / "lab_compare.html").read_text()
    assert "selm, compared with online DPO: less regret in needle, base" in page
    for cell in compare_page.rows(found.compared)[1][0]:
        assert f"{cell}</td>" in page or f"{cell}</bdi>" in page, cell


def test_a_run_that_diverged_has_no_number():
    broken = records()
    broken[0] |= {"difference": np.nan, "relative": np.nan}
    assert compare_page.rows(broken)[1][0][1] == "–, 0 / 1"


def test_conditions_without_the_base_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *_, **__: pytest.fail("it ran"))
    told = CliRunner().invoke(command.app, ["compare", "--conditions", "thin coverage, table"])
    assert told.exit_code == 2 and "lacks" in told.output and "'base" in told.output


def test_an_unknown_condition_is_refused_with_those_that_exist():
    told = CliRunner().invoke(command.app, ["compare", "--conditions", "base,fog"])
    assert told.exit_code == 2 and "'fog' is unknown" in told.output and "table" in told.output


TINY = WorldShape(prompts=2, responses=16, dimension=3)
SMALL = [a for a in ARMS if a.name in ("selm", "ipo_online", "pilaf", "best_of_4")]


def tiny(**changed):
    places = [Place("needle"), Place("cyclic", "moving reference", moving=True)]
    places = [dataclass_with(p, dimension=3) for p in places]
    whole = {"shape": TINY, "length": Length(2, 2, 2), "arms": SMALL, "places": places} | changed
    return list(compare.compare(4, 0, **whole))[-1]


def dataclass_with(place, **changed):
    return Place(**{**vars(place), **changed})


@pytest.mark.slow  # one compilation of all losses
def test_two_runs_are_equal_and_cells_do_not_depend_on_others():
    once, again = tiny(), tiny()
    assert json.dumps(once) == json.dumps(again)
    names = {r["arm"] for r in once.compared}
    assert names == {a.name for a in SMALL}
    apart = [r for r in once.compared if r["effect"] in ("data", "fit")]
    assert {r["arm"] for r in apart} == {"selm", "ipo_online"}
    fewer = tiny(arms=SMALL[:1])
    mine = [r for r in once.compared if r["arm"] == SMALL[0].name]
    for a, b in zip(mine, fewer.compared, strict=True):
        assert {k: v for k, v in a.items() if k != "p_holm"} == {
            k: v for k, v in b.items() if k != "p_holm"
        }


def test_strengths_are_chosen_on_worlds_that_are_not_reported(monkeypatch):
    """The tuning worlds say that the last strength is best, and the reported ones cannot object."""
    asked = []

    class Runs:
        def __init__(self, *_):
            pass

        def compile(self, _):
            pass

        def __call__(self, tasks, which):
            asked.append(which)
            tuning = which.start > 0
            return {
                t: np.full((len(which), 2), (2 - t.strength if tuning else 1 + t.strength) / 9)
                + np.linspace(0, 1e-3, len(which))[:, None]
                for t in tasks
            }

    monkeypatch.setattr(compare, "_Runs", Runs)
    selm = next(a for a in ARMS if a.name == "selm")
    *_, found = compare.compare(6, arms=[selm], places=[Place("needle")])
    tuning, reported = asked[0], asked[1]
    assert not set(tuning) & set(reported) and reported == range(6)
    assert all(r["strength"] == selm.strengths[-1] for r in found.compared)


@pytest.mark.parametrize(("seeds", "calls"), [(2, 2), (127, 3), (128, 3)])
def test_odd_numbers_of_seeds_need_no_more_calls(monkeypatch, seeds, calls):
    """Blocks are padded: 127 seeds and their 63 tuning worlds share no divisor but 1."""
    made = []

    def program(*_):
        def run(key, which, entry):
            made.append(which)
            return contest.Outcome(np.tile(np.asarray(which)[:, None], 2), np.zeros(len(which)))

        return run

    monkeypatch.setattr(contest, "program", program)
    worlds = range(seeds), range(seeds, seeds + max(seeds // 2, 2))
    task = Task(ARMS[0], Place("needle"))
    runs = compare._Runs(TINY, Length(2, 2, 2), 0, compare._block(*map(len, worlds)))
    for which in worlds:
        assert runs([task], which)[task].tolist() == [[n, n] for n in which]
    assert len(made) == calls


def test_every_effect_is_one_family_and_places_cover_the_landscapes():
    assert {p.landscape for p in compare.PLACES} == set(LANDSCAPES)
    assert len(compare.PLACES) == 6 * len(compare.CONDITIONS)
    task = Task(ARMS[0], compare.PLACES[0])
    assert task.asker and task.judged and hash(task)


# --- the documents -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    return json.loads((DOCS / "images/lab_compare.json").read_text())


@pytest.mark.parametrize("name", ["exploration", "methods"])
def test_the_documents_say_what_the_committed_numbers_say(committed, name):
    """`python docs/exploration.py` would change nothing."""
    text = (DOCS / f"{name}.md").read_text()
    assert runpy.run_path(str(DOCS / "exploration.py"))[name](text, committed) == text
    assert compare_page.where(committed, "selm")[0] in (DOCS / "methods.md").read_text()


def test_the_document_has_the_committed_table_of_acquisition_rules():
    found = json.loads((DOCS / "images/lab_acquire.json").read_text())
    text = (DOCS / "exploration.md").read_text()
    assert runpy.run_path(str(DOCS / "exploration.py"))["acquisition"](text, found) == text
    for control, rule, less, more in (
        ("random", "random_distinct", 30, 1),
        ("random", "d_optimal", 35, 1),
        ("random", "entropy", 15, 3),
        ("random", "reward_gap", 9, 14),
        ("random_distinct", "d_optimal", 14, 0),
        ("random_distinct", "entropy", 3, 5),
        ("random_distinct", "reward_gap", 7, 26),
    ):
        mine = [r for r in found if (r["arm"], r["control"]) == (rule, control)]
        assert compare_page.counts(mine) == (less, more)
    gain = {
        rule: sum(r["difference"] for r in found if (r["arm"], r["control"]) == (rule, "random"))
        for rule in ("random_distinct", "d_optimal", "entropy")
    }
    assert gain["random_distinct"] / gain["d_optimal"] == pytest.approx(0.37, abs=0.005)
    assert gain["random_distinct"] < gain["entropy"] < 0


def test_the_document_counts_what_the_committed_numbers_count(committed):
    text = " ".join((DOCS / "exploration.md").read_text().split())
    best = [r for r in committed if r["effect"] == "best"]
    less, more = compare_page.counts(best)
    assert f"Of {len(best)} comparisons {less} have significantly less regret and {more}" in text
    for condition in compare.CONDITIONS:
        less, more = compare_page.counts([r for r in best if r["condition"] == condition])
        assert f"| {condition} | {less} / {more} |" in text
    for r in best:
        assert r["arm"] in {a.name for a in ARMS} and r["landscape"] in LANDSCAPES
