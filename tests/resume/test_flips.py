"""A flipped bit anywhere in a run folder is refused with the file's name, or changes no output.

Flipped bits on a disk or a network are rare, but a week-long run that reads back terabytes meets
one. Each case copies a folder, flips one bit of a file in it, and runs the command again. Files are
drawn uniformly, so that small ones (records, settings, metrics) have as many flips as the weights.
No file is left out.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter

import pytest
import runs
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.commands.ending import is_for_the_user
from selm_jax.iterate import iterate
from selm_jax.parallel import multihost
from selm_jax.report import page
from selm_jax.run.folder import Folder
from selm_jax.run.run import Run
from selm_jax.shell import parts

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
FLIPS = 60


def go(file, folder):
    iterate(Run(config.load(file, [f"output={folder}"]), QUIET))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """One iteration: three parts of responses, four of scores, seven updates."""
    return tiny.experiment(
        tmp_path_factory.mktemp("flips"), output="run", iterations=1, data__limit=16,
        training__learning_rate=[1e-3], training__global_batch=2, training__checkpoint_every=2,
        feedback__prompts_per_part=4, compute__preset="single",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(file):
    """The folder of a run without faults. Its name is relative: it stands in some artefacts."""
    where = file.parent / "whole"
    where.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        go(file, "run")
    return where / "run"


def stopped_in(stage, file, where):
    """The folder of a run that was told to stop when this stage had done a part of its work."""
    where.mkdir()
    done = Counter()

    def count(at, number):
        done[at] += 1
        if at == stage and done[at] == number:
            multihost._told_to_stop.set()

    write, log = parts.write, Folder.log

    def write_and_count(part, table):
        write(part, table)
        count({"responses": "generate", "scores": "rank"}[part.parent.name], 2)

    def log_and_count(self, name, *rest):
        log(self, name, *rest)
        count(name, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.setattr("selm_jax.shell.parts.write", write_and_count)
        patch.setattr(Folder, "log", log_and_count)
        try:
            with pytest.raises(multihost.Stopped):
                go(file, "run")
        finally:
            multihost._told_to_stop.clear()
    begun = [k for k, v in runs.stages(where / "run").items() if not v["done"]]
    assert begun == [(1, stage)]
    return where / "run"


def flip(folder, chance):
    """Flips one bit of a file that is not empty; returns the file's name in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return file.relative_to(folder)


def outcome(file, where, name, expected):
    """What giving the command again, and asking for the report, comes to: refused or the same."""
    folder = where / "run"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(where)
            go(file, "run")
            page.write([folder], where / "page.html")
    except Exception as e:  # noqa: BLE001  (whatever it is, it is judged)
        assert is_for_the_user(e), f"{name}: a traceback: {e!r}"
        named = (name.name, name.name.removeprefix(".").removesuffix(".sha256"), *name.parts[1:-1])
        assert any(each in str(e) for each in named), f"{name}: not named: {e}"
        return "refused"
    found = runs.content(folder)
    assert not runs.differences(found, expected), f"{name}: {runs.differences(found, expected)}"
    return "no effect"


def test_bits_of_a_stopped_run(file, whole, tmp_path, tried):
    """Stopped in generate, in rank and in train."""
    expected, chance, told = runs.content(whole), random.Random(60), Counter()
    for stage in ("generate", "rank", "train"):
        left = stopped_in(stage, file, tmp_path / stage)
        for case in range(FLIPS // 3):
            where = tmp_path / f"{stage}-{case}"
            shutil.copytree(left, where / "run")
            name = flip(where / "run", chance)
            told[outcome(file, where, name, expected)] += 1
            shutil.rmtree(where)
    tried(f"{FLIPS} flips in stopped runs: {told['refused']} refused by name, "
          f"{told['no effect']} without effect")  # fmt: skip
    assert told.total() == FLIPS and told["refused"] > FLIPS / 2


def test_bits_of_a_finished_run(file, whole, tmp_path, tried):
    """The page is an output too: nothing is done again, so all its bytes are the same."""
    expected, chance, told = runs.content(whole), random.Random(61), Counter()
    page_before = (whole / "report.html").read_bytes()
    for case in range(FLIPS):
        where = tmp_path / str(case)
        shutil.copytree(whole, where / "run")
        name = flip(where / "run", chance)
        told[result := outcome(file, where, name, expected)] += 1
        if result == "no effect":
            assert (where / "page.html").read_bytes() == page_before, name
        shutil.rmtree(where)
    tried(f"{FLIPS} flips in a finished run: {told['refused']} refused by name, "
          f"{told['no effect']} without effect")  # fmt: skip
    assert told.total() == FLIPS and told["refused"] > FLIPS / 2
