"""Every table is read back as written, keeps its bytes, and refuses other tables."""

from __future__ import annotations

import dataclasses
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selm_jax.preferences.examples import Example
from selm_jax.shell import artifacts
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.tables import examples, heldout, heldout_pairs, pairs, ranked, responses, scores

NAN = math.nan

# What stood in the files of the first version, typed anew: tables may not drift from it.
TEXT, INT, IDS = pa.string(), pa.int32(), pa.list_(pa.int32())
LOGPS = pa.list_(pa.float32())
COLUMNS = {
    responses: {
        "prompt_id": TEXT, "sample": INT, "kind": TEXT, "token_ids": IDS, "text": TEXT,
        "finish": TEXT, "logps": LOGPS, "sampled_logps": LOGPS,
    },
    ranked: {
        "prompt_id": TEXT, "prompt": TEXT, "candidate": INT, "source": TEXT, "sample": INT,
        "token_ids": IDS, "text": TEXT, "finish": TEXT, "score": pa.float64(), "rank": INT,
        "chosen": pa.bool_(), "rejected": pa.bool_(), "explore": pa.bool_(), "dropped": TEXT,
        "preference": pa.float64(),
    },
    examples: {
        "prompt_id": TEXT, "prompt": IDS, "responses": pa.list_(IDS), "chosen": INT,
        "rejected": INT, "explore": INT, "reference": pa.list_(pa.float32()),
        "scores": pa.list_(pa.float32()), "explored": IDS, "importance": pa.list_(LOGPS),
        "shared": pa.list_(pa.float32()), "bonus": pa.float64(),
    },
    heldout: {
        "prompt_id": TEXT, "prompt": TEXT, "kind": TEXT, "sample": INT, "text": TEXT,
        "token_ids": IDS, "finish": TEXT, "score": pa.float64(), "logp": pa.float32(),
        "logp_start": pa.float32(),
    },
    heldout_pairs: {
        "prompt_id": TEXT, "role": TEXT, "logp": pa.float32(), "logp_start": pa.float32(),
    },
    pairs: {
        "prompt_id": TEXT, "prompt": TEXT, "chosen": TEXT, "rejected": TEXT,
        "reward_chosen": pa.float32(), "reward_rejected": pa.float32(),
    },
    scores: {"prompt_id": TEXT, "scores": pa.list_(pa.float64())},
}  # fmt: skip

ROWS = {
    responses: [
        responses.Row("p0", 0, "greedy", (5, 6), "Ja, süß", "stop", (-0.5, -2.0)),
        responses.Row("p0", 1, "sample", (5,), "Ja", "stop", (-0.5,), (-0.25,)),
        responses.Row("p1", 1, "sample", (), "", "length"),
    ],
    ranked: [
        ranked.Row(
            "p0", "?", 0, "greedy", 0, (5,), "x", "stop", 0.1, 1, chosen=True, preference=0.9
        ),
        ranked.Row("p0", "?", 1, "chosen", 0, None, "y", "dataset", 0.0, 2, rejected=True),
        ranked.Row("p1", "?", 0, "sample", 2, (), "", "length", dropped="tie"),
    ],
    heldout: [
        heldout.Row("p0", "?", "greedy", 0, "x", (5,), "stop", 0.1, -1.5, -2.0),
        heldout.Row("p0", "?", "sample", 1, "y", (6, 7), "length", NAN, NAN, NAN),
    ],
    heldout_pairs: [
        heldout_pairs.Row("p0", "chosen", -1.5, -2.0),
        heldout_pairs.Row("p0", "rejected", NAN, -0.25),
    ],
    pairs: [pairs.Row("p0", "?", "good", "bad", 1.5, -0.5)],
}  # fmt: skip


def as_text(rows) -> list[str]:
    """The rows as text, to compare them although NaN differs from itself."""
    return list(map(repr, rows))


def in_files(row) -> dict:
    """A row as stored in a file, with null for unknown values."""
    found = dataclasses.asdict(row)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


@pytest.mark.parametrize("table", COLUMNS, ids=lambda t: t.__name__.rpartition(".")[2])
def test_the_columns_are_those_of_every_run_folder(table):
    assert pa.schema(COLUMNS[table].items()) == table.SCHEMA


@pytest.mark.parametrize("table", ROWS, ids=lambda t: t.__name__.rpartition(".")[2])
class TestTable:
    def test_what_is_written_is_read_back(self, table, tmp_path):
        table.write(tmp_path / "t.parquet", ROWS[table])
        assert as_text(table.read(tmp_path / "t.parquet")) == as_text(ROWS[table])

    def test_no_rows_are_a_table_too(self, table, tmp_path):
        table.write(tmp_path / "t.parquet", [])
        assert table.read(tmp_path / "t.parquet") == []
        assert pq.read_schema(tmp_path / "t.parquet") == table.SCHEMA

    def test_the_file_has_the_bytes_that_it_always_had(self, table, tmp_path):
        table.write(tmp_path / "t.parquet", ROWS[table])
        rows, schema = list(map(in_files, ROWS[table])), pa.schema(COLUMNS[table].items())
        artifacts.write_table(tmp_path / "o.parquet", pa.Table.from_pylist(rows, schema=schema))
        assert (tmp_path / "t.parquet").read_bytes() == (tmp_path / "o.parquet").read_bytes()

    def test_a_table_of_another_kind_is_refused(self, table, tmp_path):
        file = tmp_path / "t.parquet"
        artifacts.write_table(file, pa.table({"prompt_id": ["p0"], "answer": ["x"]}))
        with pytest.raises(
            ArtifactError, match="has no column .*; it has prompt_id, answer. Restore"
        ):
            table.read(file)

    def test_a_column_of_another_type_is_refused(self, table, tmp_path):
        file = tmp_path / "t.parquet"
        table.write(file, ROWS[table])
        found = pq.read_table(file)
        *_, last = (name for name in found.column_names if found.schema.field(name).type != TEXT)
        at = found.column_names.index(last)
        artifacts.write_table(file, found.set_column(at, last, pa.array(["much"] * len(found))))
        with pytest.raises(ArtifactError, match="t.parquet has a column of the wrong type"):
            table.read(file)

    def test_a_hole_where_a_value_must_be_is_refused(self, table, tmp_path):
        file = tmp_path / "t.parquet"
        table.write(file, ROWS[table])
        rows = pq.read_table(file).to_pylist()
        rows[-1]["prompt_id"] = None
        artifacts.write_table(file, pa.Table.from_pylist(rows, schema=table.SCHEMA))
        with pytest.raises(ArtifactError, match=f"row {len(rows) - 1}: prompt_id is empty"):
            table.read(file)

    def test_a_damaged_file_is_named(self, table, tmp_path):
        (tmp_path / "t.parquet").write_bytes(b"no parquet")
        with pytest.raises(ArtifactError, match="t.parquet: this table is damaged"):
            table.read(tmp_path / "t.parquet")
        with pytest.raises(FileNotFoundError):
            table.read(tmp_path / "none.parquet")


@pytest.mark.parametrize("table", [ranked, heldout])
def test_token_ids_may_be_left_out(table, tmp_path):
    table.write(tmp_path / "t.parquet", ROWS[table])
    found = table.read(tmp_path / "t.parquet", token_ids=False)
    assert as_text(found) == as_text(dataclasses.replace(r, token_ids=()) for r in ROWS[table])


def test_answers_of_earlier_versions_have_no_logps(tmp_path):
    file = tmp_path / "t.parquet"
    responses.write(file, ROWS[responses])
    pq.write_table(pq.read_table(file).drop_columns(["logps", "sampled_logps"]), file)
    plain = [dataclasses.replace(r, logps=None, sampled_logps=None) for r in ROWS[responses]]
    assert responses.read(file) == plain


def test_answers_are_kept_with_how_they_were_sampled(tmp_path):
    file, sampling = tmp_path / "t.parquet", {"temperature": 0.7, "top_k": 0, "filter": None}
    row = responses.Row("p0", 1, "sample", (5, 6), "Ja", "stop", (-0.5, NAN), (NAN, NAN))
    responses.write(file, [row], sampling)
    assert responses.sampling_of(file) == sampling
    assert as_text(responses.read(file)) == as_text([row])
    assert pq.read_table(file)["logps"].to_pylist() == [[-0.5, None]]
    responses.write(file, [row])
    assert responses.sampling_of(file) == {}


EXAMPLES = [
    Example("p0", (1, 2), ((3,), (4, 5)), {"chosen": 1, "rejected": 0}, (-1.5, -0.25), (2.0, 1.0)),
    Example("p1", (1,), ((3,), (4,), (5,)), {"chosen": 0, "rejected": 1, "explore": 2},
            explored=(2, 0, 2)),
    Example("p2", (1,), ((3, 4), (5,)), {"chosen": 0, "rejected": 1}, (-1.5, -0.25),
            bonus=0.5, shared_logps=(-1.0, -0.25)),
]  # fmt: skip


def test_examples_are_read_back_with_the_model_that_scored_them(tmp_path):
    file = tmp_path / "examples.parquet"
    examples.write(file, EXAMPLES, "abc")
    assert examples.read(file) == EXAMPLES
    assert examples.reference_digest(file) == "abc" and examples.start_digest(file) == ""
    rows = [
        dataclasses.asdict(e)
        | {role: e.roles.get(role) for role in ("chosen", "rejected", "explore")}
        | {"reference": e.reference_logps, "shared": e.shared_logps}
        for e in EXAMPLES
    ]
    schema = examples.SCHEMA.with_metadata({"digest of the reference": "abc"})
    artifacts.write_table(tmp_path / "o.parquet", pa.Table.from_pylist(rows, schema=schema))
    assert file.read_bytes() == (tmp_path / "o.parquet").read_bytes()


def test_scores_are_read_back_with_what_they_are_of(tmp_path):
    rows = [scores.Row("p0", (0.5, NAN, 1.0)), scores.Row("p1", ())]
    file = tmp_path / "part-0.parquet"
    scores.write(file, rows, about="three candidates")
    assert as_text(scores.read(file)) == as_text(rows)
    assert scores.about(file) == "three candidates"
    assert pq.read_table(file)["scores"].to_pylist() == [[0.5, None, 1.0], []]
    pq.write_table(pq.read_table(file).replace_schema_metadata(), file)
    assert scores.about(file) == ""
