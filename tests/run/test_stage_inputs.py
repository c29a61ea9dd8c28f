"""Every kind of stage input has a digest; any other argument is an error."""

from __future__ import annotations

import pytest

from selm_jax.evaluation import EvaluationError
from selm_jax.run.inputs import LazyRanker, LazyTasks, Model, StoredTable, digests_of
from selm_jax.shell import artifacts
from selm_jax.text.prompts import Message, Prompt


def test_a_table_is_known_by_its_bytes_and_its_file(tmp_path):
    (tmp_path / "ranked.parquet").write_bytes(b"one")
    before = digests_of({"ranked": StoredTable(tmp_path, "ranked.parquet")})
    assert before == {"ranked.parquet": artifacts.digest(tmp_path / "ranked.parquet")}
    (tmp_path / "ranked.parquet").write_bytes(b"two!")
    assert digests_of({"ranked": StoredTable(tmp_path, "ranked.parquet")}) != before


def test_a_table_that_is_not_what_its_stage_left_is_refused(tmp_path):
    file = tmp_path / "ranked.parquet"
    file.write_bytes(b"one")
    artifacts.Stages(tmp_path).finish("rank", {}, {}, {file.name: file}, {}, 0.0)
    file.write_bytes(b"two!")
    with pytest.raises(artifacts.ArtifactError, match="has changed since stage 'rank' wrote it"):
        digests_of({"ranked": StoredTable(tmp_path, "ranked.parquet")})


def test_a_model_is_known_by_its_bytes_under_the_name_of_its_part(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = digests_of({"policy": Model(tmp_path), "reference": Model(tmp_path)})
    assert found == dict.fromkeys(("policy", "reference"), artifacts.digest(tmp_path))


def test_prompts_are_known_by_what_they_say():
    one = [Prompt("a", (Message("user", "Hello"),))]
    two = [Prompt("a", (Message("user", "Goodbye"),))]
    assert digests_of({"prompts": one}) == digests_of({"prompts": list(one)})
    assert digests_of({"prompts": one}) != digests_of({"prompts": two})


def test_a_ranker_that_is_not_asked_for_is_not_built():
    def build():
        raise AssertionError("built")

    assert digests_of({"ranker": None}) == {}
    LazyRanker(build)


def test_a_folder_of_tasks_that_is_not_there_is_an_error_and_no_change(tmp_path):
    folder = tmp_path / "tasks"
    with pytest.raises(EvaluationError, match=r"task_folder .*tasks: this folder does not exist"):
        digests_of({"tasks": LazyTasks(list, folder, None)})
    folder.mkdir()
    assert set(digests_of({"tasks": LazyTasks(list, folder, None)})) == {"evaluation.task_folder"}


@pytest.mark.parametrize("value", [7, "text", {"a": 1}, ("a",), ["text"]])
def test_an_argument_without_a_digest_is_a_fault(value):
    with pytest.raises(TypeError, match="prompts.*which has no digest"):
        digests_of({"prompts": value})
