"""A multi-modal checkpoint's text model is read alone, and written alone or inside the same."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from selm_jax.models.families import read_as_reward_model, read_config
from selm_jax.weights.export import convert_dtype, export_folder
from selm_jax.weights.files import Checkpoint, open_checkpoint
from selm_jax.weights.huggingface import WeightsError, load

SOURCE = Path(__file__).parents[1] / "golden" / "families" / "gemma-3-images"
WHOLE_NUMBERS = {  # of which no parameter is
    "vision_tower.position_ids": np.arange(4)[None],
    "vision_tower.seen": np.array([True, False, True]),
}


def folder(path: Path, rename=lambda name: name, **more: np.ndarray) -> Path:
    """A copy of the checkpoint whose tensors have other names, with further tensors."""
    path.mkdir()
    (path / "config.json").write_text((SOURCE / "config.json").read_text())
    tensors = {rename(k): v for k, v in load_file(SOURCE / "model.safetensors").items()}
    save_file(tensors | more, path / "model.safetensors", metadata={"format": "pt"})
    return path


def as_in_transformers(name: str) -> str:
    """The name in the classes of transformers, with which some of its versions saved."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    return f"model.{name}"


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def exported(source: Path, to: Path, **options) -> dict[str, np.ndarray]:
    """The tensors of the exported model, whose parameters are doubled."""
    config = read_config(source)
    params = jax.tree.map(lambda x: 2 * x, load(source, config))
    export_folder(params, config, source, to, "# card\n", **options)
    same(load(to, read_config(to)), params)
    return load_file(to / "model.safetensors")


@pytest.mark.parametrize("rename", [lambda name: name, as_in_transformers])
def test_the_whole_is_written_with_the_same_names_and_the_other_bytes(rename, tmp_path):
    source = folder(tmp_path / "source", rename, **WHOLE_NUMBERS)
    same(load(source, read_config(source)), load(SOURCE, read_config(SOURCE)))
    before, after = load_file(source / "model.safetensors"), exported(source, tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if "language_model" in name:
            np.testing.assert_array_equal(after[name], 2 * tensor.astype(np.float32))
        else:
            assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
            assert after[name].tobytes() == tensor.tobytes()
    was, now = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert now == was | {"dtype": "float32"}
    convert_dtype(tmp_path / "out", tmp_path / "small", "float16")
    for name, tensor in load_file(tmp_path / "small" / "model.safetensors").items():
        kind = after[name].dtype if name in WHOLE_NUMBERS else np.float16
        assert tensor.dtype == kind
        assert tensor.tobytes() == after[name].astype(kind).tobytes()


def test_of_a_shared_export_each_process_reads_what_it_writes(tmp_path, monkeypatch):
    source = folder(tmp_path / "source", **WHOLE_NUMBERS)
    config, params = read_config(source), load(source, read_config(source))
    read, bytes_of = [], Checkpoint.bytes_of

    def spied(self, name):
        read.append(name)
        return bytes_of(self, name)

    def files(to: Path, part: tuple[int, int]) -> dict[str, bytes]:
        if part[0]:  # only the first process writes the rest of the folder
            to.mkdir()
        export_folder(params, config, source, to, "", max_shard_bytes=9000, part=part)
        return {file.name: file.read_bytes() for file in to.glob("model*")}

    expected = files(tmp_path / "alone", (0, 1))
    monkeypatch.setattr(Checkpoint, "bytes_of", spied)
    parts = [files(tmp_path / f"{i}", (i, 3)) for i in range(3)]
    assert all(parts) and {k: v for each in parts for k, v in each.items()} == expected
    assert len(read) > 3 and len(set(read)) == len(read)


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, np.complex64, np.uint8])
def test_tensors_of_images_may_have_any_dtype(tmp_path, kind):
    name, odd = "vision_tower.odd", np.arange(6).reshape(2, 3).astype(kind)
    source = folder(tmp_path / "source", **{name: odd})
    config = read_config(source)
    export_folder(load(source, config), config, source, tmp_path / "out", "# card\n")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.tensors[name] == before.tensors[name]
    assert after.bytes_of(name).tobytes() == odd.tobytes()


def test_the_text_model_alone_is_a_folder_of_its_own(tmp_path):
    source = folder(tmp_path / "source")
    for name in ("preprocessor_config.json", "generation_config.json"):
        (source / name).write_text("{}")
    tensors = exported(source, tmp_path / "out", keep_vision=False)
    assert all(name.startswith("model.") for name in tensors)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["model_type"] == "gemma3_text" and found["architectures"] == ["Gemma3ForCausalLM"]
    assert "vision_config" not in found and found["dtype"] == "float32"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md",
    }  # fmt: skip


def test_transformers_loads_the_text_model_alone(tmp_path, all_logits):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = read_config(SOURCE)
    params = load(SOURCE, config)
    export_folder(params, config, SOURCE, tmp_path / "out", "# card\n", keep_vision=False)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 60)).astype(np.int32)
    found = []
    for kind, at in (
        (transformers.AutoModelForCausalLM, tmp_path / "out"),
        (transformers.AutoModelForImageTextToText, SOURCE),
    ):
        model, loading = kind.from_pretrained(at, dtype=torch.float32, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys"))
        with torch.no_grad():
            found.append(model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy())
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_reward_model_starts_from_the_text_model(tmp_path):
    config = read_as_reward_model(SOURCE / "config.json", None)
    params = load(SOURCE, config, fresh_head=True)
    export_folder(params, config, SOURCE, tmp_path / "out", "# card\n")
    assert read_config(tmp_path / "out") == config
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["architectures"] == ["Gemma3TextForSequenceClassification"]
    assert "model.embed_tokens.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_tensors_that_are_unknown_or_there_twice_are_named(tmp_path):
    unknown = folder(tmp_path / "unknown", **{"audio_tower.weight": np.zeros(2, np.float16)})
    with pytest.raises(WeightsError, match=r"unknown: audio_tower\.weight"):
        load(unknown, read_config(unknown))
    again = {"model.language_model.norm.weight": np.zeros(16, np.float16)}
    with pytest.raises(WeightsError, match="tensors are stored twice"):
        load(folder(tmp_path / "twice", **again), read_config(SOURCE))
