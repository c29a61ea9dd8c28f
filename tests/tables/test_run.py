"""Every table of a run reads back as what was written, and writes back as the same bytes."""

from __future__ import annotations

import json

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run
from selm_jax.tables import examples, heldout, heldout_pairs, pairs, ranked, responses

WHERE = {
    responses: "responses/part-*.parquet",
    ranked: "ranked.parquet",
    heldout: "heldout.parquet",
    heldout_pairs: "heldout_pairs.parquet",
    pairs: "pairs.parquet",
}


def finished(folder, **changes) -> Run:
    """A run on pairs, whose held-out data has answers too."""
    file = tiny.experiment(
        folder, data__chosen="chosen", data__rejected="rejected", iterations=1,
        training__learning_rate=1e-3, training__checkpoint_every=100, **changes,
    )  # fmt: skip
    for name, count in (("train", 12), ("heldout", 5)):
        rows = [
            {"prompt_id": f"{name}{i}", "prompt": f"Say {name} {i}.", "chosen": f"Yes, {i}.",
             "rejected": "No."}
            for i in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(config.load(file), Console(quiet=True))
    iterate(run)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of a language model, one of a reward model: together they leave every table."""
    return [
        finished(tmp_path_factory.mktemp("selm")),
        finished(
            tmp_path_factory.mktemp("rated"), objective={"loss": "bradley_terry"},
            candidates={"greedy": 0, "samples": 0, "dataset": True},
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("table", WHERE, ids=lambda t: t.__name__.rpartition(".")[2])
def test_a_table_of_a_run_reads_back_equal(table, runs, tmp_path):
    files = [
        file for run in runs for file in sorted(run.folder.path.glob(f"iteration_*/{WHERE[table]}"))
    ]
    assert files
    rows = 0
    for file in files:
        found = table.read(file)
        rows += len(found)
        about = [table.sampling_of(file)] if table is responses else []
        table.write(tmp_path / "again.parquet", found, *about)
        assert list(map(repr, table.read(tmp_path / "again.parquet"))) == list(map(repr, found))
        assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()
    assert rows


def test_the_examples_of_a_run_read_back_equal(runs, tmp_path):
    for run in runs:
        file = run.folder.iteration(1) / "examples.parquet"
        found = examples.read(file)
        assert found
        examples.write(tmp_path / "again.parquet", found, examples.reference_digest(file))
        assert examples.read(tmp_path / "again.parquet") == found
        assert (tmp_path / "again.parquet").read_bytes() == file.read_bytes()


def test_no_file_of_a_run_is_a_table_without_a_room(runs):
    known = {file for run in runs for where in WHERE.values()
             for file in run.folder.path.glob(f"iteration_*/{where}")}  # fmt: skip
    known |= {run.folder.iteration(1) / "examples.parquet" for run in runs}
    assert {file for run in runs for file in run.folder.path.rglob("*.parquet")} == known
