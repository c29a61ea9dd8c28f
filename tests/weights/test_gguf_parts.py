"""A GGUF model in several files equals the model in one; missing or wrong parts are named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from selm_jax.weights import sources
from selm_jax.weights.gguf import GGUFError, convert
from selm_jax.weights.sources import resolve


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_gguf):
    """(the model in one file, the folder of its parts)"""
    base = tmp_path_factory.mktemp("made")
    (base / "parts").mkdir()
    first = tiny_gguf(base / "parts" / "m.gguf", kind=Q.Q8_0, split=5)
    assert first.name == "m-00001-of-00004.gguf"
    return tiny_gguf(base / "m.gguf", kind=Q.Q8_0), first.parent


@pytest.fixture
def parts(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "parts")


def part(folder: Path, n: int, count: int = 4, name: str = "m") -> Path:
    return folder / f"{name}-{n:05d}-of-{count:05d}.gguf"


@pytest.mark.parametrize("given", [1, 2, 4])
def test_parts_are_the_whole(made, parts, given, tmp_path):
    """Any of the parts can be named."""
    whole = convert(made[0], tmp_path / "whole")
    found = convert(part(parts, given), tmp_path / "found")
    for file in whole.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_model_in_parts_is_converted_once_whichever_part_is_named(parts, tmp_path, monkeypatch):
    first = resolve(str(part(parts, 1)), cache=tmp_path / "cache")
    assert first.path.name.startswith("m-") and first.origin["kind"] == "gguf"
    monkeypatch.setattr(sources, "convert", None)  # a call would fail
    again = resolve(str(part(parts, 3)), cache=tmp_path / "cache")
    assert (again.path, again.origin["sha256"]) == (first.path, first.origin["sha256"])


def test_its_digest_sees_every_part(made, parts, tiny_gguf, tmp_path):
    before = resolve(str(part(parts, 1)), cache=tmp_path / "cache").origin["sha256"]
    other = tiny_gguf(tmp_path / "m.gguf", kind=Q.Q8_0, split=5, seed=1)
    shutil.copyfile(part(other.parent, 4), part(parts, 4))
    assert resolve(str(part(parts, 1)), cache=tmp_path / "cache").origin["sha256"] != before


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_a_missing_part_is_named(parts, lost, tmp_path):
    part(parts, lost).unlink()
    given = part(parts, 3)
    for use in (lambda: convert(given, tmp_path / "out"), lambda: resolve(str(given))):
        with pytest.raises(GGUFError, match=f"{part(parts, lost).name} is missing: .* 4 GGUF"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_part_under_another_name_is_told(parts, tmp_path):
    alone = part(parts, 1).rename(tmp_path / "alone.gguf")
    with pytest.raises(GGUFError, match=r"alone\.gguf is one of 4 files .* one of 1 according"):
        convert(alone, tmp_path / "out")


def test_parts_in_the_wrong_order_are_told(parts, tmp_path):
    part(parts, 2).rename(tmp_path / "kept")
    part(parts, 3).rename(part(parts, 2))
    (tmp_path / "kept").rename(part(parts, 3))
    with pytest.raises(GGUFError, match="00002-of-00004.gguf is part 3 .*, but part 2 according"):
        convert(part(parts, 1), tmp_path / "out")


def test_a_part_of_another_model_is_told(parts, tiny_gguf, tmp_path):
    """There is one tensor fewer than the first file says."""
    (tmp_path / "other").mkdir()
    name = "blk.1.ffn_up.weight"
    tiny_gguf(tmp_path / "other" / "m.gguf", kind=Q.Q8_0, split=5, drop=(name,))
    shutil.copyfile(part(tmp_path / "other", 4), part(parts, 4))
    with pytest.raises(GGUFError, match="have 19 tensors, but key split.tensors.count says 20"):
        convert(part(parts, 1), tmp_path / "out")


def test_what_is_wrong_with_a_tensor_is_told_with_its_own_file(tiny_gguf, tmp_path):
    bad = {"output_norm.weight": np.full(64, np.nan, np.float32)}
    first = tiny_gguf(tmp_path / "m.gguf", split=1, change=bad)
    with pytest.raises(
        GGUFError, match="00002-of-00020.gguf: tensor output_norm.weight contains NaN"
    ):
        convert(first, tmp_path / "out")


def test_a_pointer_or_half_of_a_part_is_named(parts, tmp_path):
    part(parts, 2).write_bytes(part(parts, 2).read_bytes()[:-5000])
    with pytest.raises(GGUFError, match="00002-of-00004.gguf: damaged, cut off"):
        convert(part(parts, 1), tmp_path / "out")
    part(parts, 2).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:01\n")
    with pytest.raises(GGUFError, match="00002-of-00004.gguf is a Git LFS pointer"):
        convert(part(parts, 1), tmp_path / "out")
