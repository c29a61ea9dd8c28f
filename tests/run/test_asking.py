"""Ranking in parts: which finished parts are reused after a stop, and which are not."""

import contextlib
import itertools
import json
import os
import shutil
import signal

import pyarrow.parquet as pq
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.config import ConfigError
from selm_jax.iterate import run_stage
from selm_jax.parallel import multihost
from selm_jax.parallel.multihost import Stopped
from selm_jax.run.inputs import LazyRanker
from selm_jax.run.run import Run
from selm_jax.shell import artifacts, parts
from selm_jax.shell.shared_stages import SharedStages
from selm_jax.stages import asking
from selm_jax.stages.rank import rank as rank_stage
from selm_jax.stages.step import Step

QUIET = Console(quiet=True)
FOUR = "feedback.prompts_per_part=4"  # of ten prompts: parts of 4, 4 and 2


class Counting:
    """Scores that look like nothing else; `asked` holds the prompts of each call.

    `at` calls something in the midst of a call, by its number from 1.
    """

    name = "counting"

    def __init__(self, at=None, unit=1.0):
        self.at, self.unit = at or {}, unit
        self.asked, self.counts = [], {}

    def scores(self, questions, candidates):
        self.asked.append([q.id for q in questions])
        self.counts = {"candidates": sum(map(len, candidates)), "malformed": 0}
        self.counts["cost"] = self.counts["candidates"] / 8
        self.at.get(len(self.asked), lambda: None)()
        return [[self.unit * len(text) / 7 + i / 3 for i, text in enumerate(c)] for c in candidates]

    def report(self):
        return dict(self.counts)


def fails():
    raise RuntimeError("the machine is gone")


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """An experiment of one iteration whose answers are there."""
    file = tiny.experiment(
        tmp_path_factory.mktemp("answered"), iterations=1, data__limit=10, data__heldout=None,
        training__learning_rate=[1e-3],
    )  # fmt: skip
    run_stage(Run(config.load(file), QUIET), "generate", 1)
    return file


@pytest.fixture
def rank(answered, tmp_path):
    """rank(name, ranker, *overrides) -> the run `name` below here, ranked by this ranker."""

    def do(name, ranker, *overrides, store=None):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(answered.parent / "run", folder)
        run = Run(config.load(answered, [f"output={folder}", *overrides]), QUIET, store=store)
        if ranker is not None:
            run.ranker = LazyRanker(lambda: ranker)
        run_stage(run, "rank", 1)
        return run

    return do


def outcome(run):
    """The bytes of what rank leaves, and its counts; it leaves nothing else."""
    names = {path.name for path in run.folder.iteration(1).iterdir()}
    assert names == {"responses", "ranked.parquet", "stage.json"}
    entry = artifacts.Stages(run.folder.iteration(1)).read()["rank"]
    return (run.folder.iteration(1) / "ranked.parquet").read_bytes(), entry["counts"]


def kept_in(folder):
    return sorted(path.name for path in (folder / "iteration_1" / "scores").glob("*.parquet"))


def test_parts_change_nothing(rank):
    whole, several = Counting(), Counting()
    assert outcome(rank("whole", whole)) == outcome(rank("several", several, FOUR))
    assert [len(each) for each in whole.asked] == [10]
    assert [len(each) for each in several.asked] == [4, 4, 2]
    assert list(itertools.chain(*several.asked)) == whole.asked[0]
    with pytest.raises(ConfigError, match="feedback.prompts_per_part: 0, a whole number from 1"):
        rank("none", whole, "feedback.prompts_per_part=0")


def test_a_run_that_dies_in_the_second_part_does_not_ask_about_the_first_again(rank, tmp_path):
    expected = outcome(rank("whole", Counting(), FOUR))
    first, second = Counting({2: fails}), Counting()
    with pytest.raises(RuntimeError, match="gone"):
        rank("died", first, FOUR)
    assert kept_in(tmp_path / "died") == ["part-00000-of-00003.parquet"]
    table = pq.read_table(tmp_path / "died/iteration_1/scores/part-00000-of-00003.parquet")
    assert table["prompt_id"].to_pylist() == first.asked[0]
    found = outcome(rank("died", second, FOUR))
    assert second.asked == [*first.asked[1:], second.asked[1]]
    assert found == expected
    counts = found[1]
    assert counts["ranker/candidates"] == 30 and counts["ranker/cost"] == 30 / 8
    assert counts["ranker/malformed"] == 0


def test_a_kill_between_the_table_and_the_end_is_harmless(rank, monkeypatch, tmp_path):
    """ranked.parquet is there, some parts are deleted, and the stage is not recorded."""
    expected = outcome(rank("whole", Counting(), FOUR))
    remove = artifacts.remove

    def dies(path):
        if path.name == asking.FOLDER and path.exists():
            remove(path / "part-00001-of-00003.parquet")
            fails()
        remove(path)

    monkeypatch.setattr(artifacts, "remove", dies)
    with pytest.raises(RuntimeError, match="gone"):
        rank("died", Counting(), FOUR)
    assert (tmp_path / "died/iteration_1/ranked.parquet").exists()
    monkeypatch.setattr(artifacts, "remove", remove)
    again = Counting()
    assert outcome(rank("died", again, FOUR)) == expected
    assert [len(each) for each in again.asked] == [4]


def told_to_stop():
    multihost._told_to_stop.set()  # as jax's notice is, or a signal where it is deferred


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("how", "kept"),
    # A notice that does not interrupt is looked at behind the part; a signal ends it at once.
    [(told_to_stop, 2), (sigterm, 1)],
)
def test_a_stop_notice_keeps_the_ranked_parts(rank, how, kept, tmp_path):
    expected = outcome(rank("whole", Counting(), FOUR))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped):
            rank("told", Counting({2: how}), FOUR)
    finally:
        signal.signal(signal.SIGTERM, before)
        multihost._told_to_stop.clear()
    assert len(kept_in(tmp_path / "told")) == kept
    again = Counting()
    assert outcome(rank("told", again, FOUR)) == expected
    assert len(again.asked) == 3 - kept


def forget_rank(folder):
    record = artifacts.Stages(folder / "iteration_1")
    entries = {k: v for k, v in record.read().items() if k != "rank"}
    artifacts.write_json(record.file, entries)


def test_parts_of_another_ranker_are_not_taken(rank, tmp_path):
    """The ranker was changed, and rank taken out of stage.json as the refusal says."""
    with pytest.raises(RuntimeError):
        rank("changed", Counting({3: fails}, unit=-1.0), FOUR)
    other = (FOUR, "feedback.settings={target: 9}")
    with pytest.raises(artifacts.ArtifactError, match="feedback.settings.*selm redo .* rank -t 1"):
        rank("changed", None, *other)
    forget_rank(tmp_path / "changed")
    assert outcome(rank("changed", None, *other)) == outcome(rank("whole", None, *other))


def test_a_cut_with_as_many_parts_takes_those_that_are_the_same(rank):
    expected = outcome(rank("whole", Counting()))
    with pytest.raises(RuntimeError):
        rank("cut", Counting({2: fails}), "feedback.prompts_per_part=5")
    again = Counting()
    assert outcome(rank("cut", again, "feedback.prompts_per_part=6")) == expected
    assert [len(each) for each in again.asked] == [6, 4]


@pytest.mark.parametrize("change", ["text", "prompt", "not ours"])
def test_a_part_of_other_candidates_is_not_taken(rank, change, tmp_path):
    with pytest.raises(RuntimeError):
        rank("run", Counting({2: fails}), FOUR)
    run = Run(config.load(tmp_path / "run/config.yaml"), QUIET)
    pool = tiny.pool(run, 1)
    questions, candidates = pool.questions(pool.asked)
    (file, *_) = parts.files(run.folder.iteration(1) / asking.FOLDER, 3)
    if change == "text":
        candidates[3][0] += "!"
    elif change == "prompt":
        questions[0] = questions[-1]
    else:
        parts.write(file, pq.read_table(file).replace_schema_metadata())
    ranker = Counting()
    step = tiny.step_of(run, rank_stage, 1)
    scores, told = asking.scores_in_parts(step, LazyRanker(lambda: ranker), questions, candidates)
    assert [len(each) for each in ranker.asked] == [4, 4, 2]
    of_texts = [each.tolist() for each in scores]
    assert of_texts == Counting().scores(questions, candidates) and told["candidates"] == 30


def test_a_judges_limit_may_be_raised_between_two_parts(rank):
    """It changes no answer: what was judged and paid for is kept, with what it cost."""
    judge = "feedback.ranker=judge"
    settings = (
        "feedback.settings={{model: m, base_url: 'http://127.0.0.1:9/v1', max_total_tokens: {}}}"
    )
    with pytest.raises(RuntimeError):
        rank("judged", Counting({3: fails}), FOUR, judge, settings.format(100))
    again = Counting()
    _, counts = outcome(rank("judged", again, FOUR, judge, settings.format(200)))
    assert [len(each) for each in again.asked] == [2]
    assert counts["ranker/cost"] == 30 / 8


def test_a_rankers_groups_are_not_cut(rank):
    grouped = Counting()
    grouped.together = 3
    rank("grouped", grouped, FOUR)
    assert [len(each) for each in grouped.asked] == [6, 4]


def test_a_bar_tells_how_far_it_is(rank, monkeypatch):
    """Also of the parts that were ranked before."""
    told = []

    @contextlib.contextmanager
    def bar(self, *about):
        told.append(about)
        yield lambda items, tokens: told.append(items)

    monkeypatch.setattr(Step, "bar", bar)
    with pytest.raises(RuntimeError):
        rank("run", Counting({2: fails}), FOUR)
    rank("run", Counting(), FOUR)
    about = (10, "prompts")
    assert told == [about, 4, about, 4, 4, 2]


def test_where_nothing_is_asked_the_counts_are_there(rank):
    run = rank("run", Counting())
    none = Counting()
    step = tiny.step_of(run, rank_stage, 1)
    scores, told = asking.scores_in_parts(step, LazyRanker(lambda: none), [], [])
    assert scores == [] and none.asked == [[]]
    assert told == {"candidates": 0, "malformed": 0, "cost": 0}


def test_a_users_rule_is_asked_in_parts_too(rank, monkeypatch, tmp_path):
    """The rule writes down what it is asked, and raises at a prompt of the third part."""
    (tmp_path / "noted_rule.py").write_text(
        "from pathlib import Path\n"
        f"here = Path({str(tmp_path)!r})\n"
        "def rule(prompt, response, row):\n"
        "    with (here / 'asked.jsonl').open('a') as f:\n"
        "        print(repr(prompt), file=f)\n"
        "    if (here / 'fail').exists() and 'garden' in prompt:\n"
        "        raise ValueError('no')\n"
        "    return len(response) / 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rule = ("feedback.ranker=noted_rule:rule", "feedback.settings={workers: 0}")
    expected = outcome(rank("whole", None, *rule))
    asked = tmp_path / "asked.jsonl"
    assert len(asked.read_text().splitlines()) == 30
    (tmp_path / "fail").touch()
    asked.unlink()
    three = "feedback.prompts_per_part=3"
    with pytest.raises(Exception, match="the rule raised ValueError"):
        rank("died", None, *rule, three)
    assert len(kept_in(tmp_path / "died")) == 2
    (tmp_path / "fail").unlink()
    asked.unlink()
    assert outcome(rank("died", None, *rule, three)) == expected
    assert len(asked.read_text().splitlines()) == 4 * 3


def test_what_another_run_has_finished_leaves_no_parts_behind(rank, tmp_path):
    """In a sweep: a run that was stopped in its second part takes what a run beside it has done."""
    store = SharedStages(tmp_path / "store")
    with pytest.raises(RuntimeError):
        rank("stopped", Counting({2: fails}), FOUR, store=store)
    expected = outcome(rank("beside", Counting(), store=store))
    nobody = Counting()
    assert outcome(rank("stopped", nobody, FOUR, store=store)) == expected and not nobody.asked


def test_a_kill_between_the_store_and_the_record(rank, tmp_path, monkeypatch):
    """The run takes its own work back, as its own, and leaves no half-made file."""
    store = SharedStages(tmp_path / "store")
    expected = outcome(rank("whole", Counting(), store=store))
    shutil.rmtree(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.Stages, "finish", lambda *_: fails())
        with pytest.raises(RuntimeError):
            rank("killed", Counting(), store=store)
    nobody = Counting()
    run = rank("killed", nobody, store=store)
    assert outcome(run) == expected and not nobody.asked
    assert not list(run.folder.path.rglob("*partial"))
    assert "shared" not in artifacts.Stages(run.folder.iteration(1)).read()["rank"]
    beside = rank("beside", nobody, store=store)
    assert "shared" in artifacts.Stages(beside.folder.iteration(1)).read()["rank"]


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "[" * 100_000, '{"outputs": 3, "about": {}}', "\0\xff", '{"about": {}}',
    '{"outputs": {"../x": "1"}, "about": {}}', '{"outputs": {"ranked.parquet": 3}, "about": {}}',
])  # fmt: skip
def test_an_entry_that_is_damaged_is_made_anew(rank, tmp_path, text):
    store = SharedStages(tmp_path / "store")
    expected = outcome(rank("one", Counting(), store=store))
    (entry,) = store.folder.glob("*/entry.json")
    good = artifacts.read_sealed(entry)
    entry.write_bytes(text.encode("latin-1"))
    counting = Counting()
    run = rank("two", counting, store=store)
    assert outcome(run) == expected and counting.asked
    assert json.loads(json.dumps(artifacts.read_sealed(entry)).replace("two", "one")) == good
