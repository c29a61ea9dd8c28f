"""Which files of a folder contain the model, and NaN and infinity in them."""

from __future__ import annotations

import io
import json
import shutil
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny import make_model
from tiny_pairrm import make_pairrm

from selm_jax.models.decoder import abstract_params
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.weights import deberta
from selm_jax.weights.export import convert_dtype
from selm_jax.weights.files import INDEX, WHOLE, WeightsError, open_checkpoint
from selm_jax.weights.huggingface import checked_config, load, save
from selm_jax.weights.sources import SourceError, resolve

PART = "model-00001-of-00001.safetensors"
NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.input_layernorm.weight",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def spoil(folder, name, value, dtype=None, file=WHOLE):
    """Sets one number of a tensor, the last."""
    tensors = load_file(folder / file)
    if dtype is not None:
        tensors = {n: x.astype(dtype) for n, x in tensors.items()}
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})


# --- not a number ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, np.float32), (-np.inf, np.float16), (np.nan, ml_dtypes.bfloat16)],
    ids=["nan", "infinity in float16", "nan in bfloat16"],
)
def test_a_tensor_with_nan_is_named_with_its_file(folder, name, value, dtype):
    spoil(folder, name, value, dtype)
    with pytest.raises(WeightsError) as caught:
        load(folder, read_config(folder))
    assert f"contain NaN or infinity:\n  {name}, in {WHOLE}\n" in str(caught.value)
    assert str(folder) in str(caught.value)


def test_it_is_found_in_whichever_shard_of_file_and_device_it_is(folder):
    """On a mesh every device looks at its own part, and all come to the same conclusion."""
    config = read_config(folder)
    params = load(folder, config)
    parts = shutil.copytree(folder, folder.parent / "parts", ignore=lambda *_: [WHOLE])
    save(params, config, parts, max_shard_bytes=20_000)
    file_of = json.loads((parts / INDEX).read_text())["weight_map"]
    assert len(set(file_of.values())) > 3
    for name in NAMES[:3]:
        spoil(parts, name, np.nan, file=file_of[name])
    where = shardings(abstract_params(config), make_mesh((2, 2, 2)), TRAINING)
    with pytest.raises(WeightsError) as caught:
        load(parts, config, shardings=where, dtype=jnp.bfloat16)
    for name in NAMES[:3]:
        assert f"{name}, in {file_of[name]}\n" in str(caught.value)
    assert NAMES[3] not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_largest_numbers_are_numbers(folder, dtype):
    spoil(folder, NAMES[1], ml_dtypes.finfo(dtype).max, dtype)
    found = load(folder, read_config(folder))["norm"]["scale"]
    assert float(found[-1]) == float(ml_dtypes.finfo(dtype).max)


def test_a_tied_model_that_stores_nan_twice_is_told_of_the_nan(folder):
    tensors = load_file(folder / WHOLE)
    save_file(tensors | {"lm_head.weight": tensors[NAMES[0]]}, folder / WHOLE)
    for name in ("lm_head.weight", NAMES[0]):
        spoil(folder, name, np.nan)
    with pytest.raises(WeightsError, match=f"contain NaN or infinity:\n  {NAMES[0]}, in"):
        load(folder, read_config(folder))


def test_pairrm_and_heads_of_reward_models_are_looked_at_too(tmp_path):
    pairrm = make_pairrm(tmp_path / "pairrm")
    config = deberta.read_config(pairrm)
    for name in ("head_layer.4.weight", "pretrained_model.encoder.layer.1.output.dense.bias"):
        before = (pairrm / WHOLE).read_bytes()
        spoil(pairrm, name, np.inf)
        with pytest.raises(WeightsError, match=f"NaN or infinity:\n  {name}, in {WHOLE}"):
            deberta.load(pairrm, config.encoder, config.tasks)
        (pairrm / WHOLE).write_bytes(before)
    deberta.load(pairrm, config.encoder, config.tasks)

    reward = make_model(tmp_path / "reward")
    hf = json.loads((reward / "config.json").read_text())
    hf |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "pad_token_id": 1}
    (reward / "config.json").write_text(json.dumps(hf))
    config = read_config(reward)
    tensors = load_file(reward / WHOLE)
    save_file(tensors | {"score.weight": np.full((1, 32), np.nan, np.float32)}, reward / WHOLE)
    with pytest.raises(WeightsError, match="NaN or infinity:\n  score.weight, in"):
        load(reward, config)


def test_an_export_in_a_narrow_dtype_holds_no_infinity(folder, tmp_path):
    spoil(folder, NAMES[1], 1e5)
    with pytest.raises(WeightsError, match=r"model\.norm\.weight .* too large for float16"):
        convert_dtype(folder, tmp_path / "float16", "float16")
    convert_dtype(folder, tmp_path / "bfloat16", "bfloat16")


# --- which files ----------------------------------------------------------------------------------


def stale(folder, times=2):
    """An index and its shards of an older save."""
    tensors = load_file(folder / WHOLE)
    save_file({n: times * x for n, x in tensors.items()}, folder / PART)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, PART)}))


def said(folder):
    console = Console(file=io.StringIO(), width=1000)
    resolve(str(folder), progress=console)
    return console.file.getvalue()


@pytest.mark.parametrize("left", ["whole", "without its shards", "with damaged shards", "empty"])
def test_model_safetensors_goes_before_an_index_as_in_transformers(model, folder, left):
    stale(folder)
    if left == "without its shards":
        (folder / PART).unlink()
    elif left == "with damaged shards":
        (folder / PART).write_bytes(b"half")
    elif left == "empty":
        (folder / INDEX).write_text("")
    assert f"{INDEX} is ignored, because there is a {WHOLE}" in said(folder)
    read, expected = open_checkpoint(folder), open_checkpoint(model)
    assert read.tensors == expected.tensors
    assert all(np.array_equal(read.read(n), expected.read(n)) for n in read.tensors)


def test_an_index_alone_is_read_without_a_word(folder):
    stale(folder, times=3)
    expected = load_file(folder / PART)
    (folder / WHOLE).unlink()
    assert said(folder) == ""
    read = open_checkpoint(folder)
    assert all(np.array_equal(read.read(n), x) for n, x in expected.items())


def test_transformers_takes_the_same_file(folder):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    stale(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()[NAMES[1]].numpy()
    assert np.array_equal(theirs, open_checkpoint(folder).read(NAMES[1]))


@pytest.mark.parametrize("file", [WHOLE, INDEX])
def test_git_lfs_pointers_are_told_for_what_they_are(folder, file):
    stale(folder)
    if file == INDEX:
        (folder / WHOLE).unlink()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:01\n")
    for use in (lambda: open_checkpoint(folder), lambda: resolve(str(folder))):
        with pytest.raises((WeightsError, SourceError), match=f"{file} is a Git LFS pointer"):
            use()


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_a_tied_model_that_stores_an_odd_embedding_twice_is_told_its_dtype(folder, dtype):
    tensors = load_file(folder / WHOLE)
    odd = tensors[NAMES[0]].astype(dtype)
    save_file(tensors | {NAMES[0]: odd, "lm_head.weight": odd}, folder / WHOLE)
    with pytest.raises(WeightsError, match=f"{NAMES[0]}: stored as"):
        load(folder, read_config(folder))


def test_more_layers_than_there_are_tensors_are_refused_at_once(folder):
    """config.json may name a number of layers that this model does not have."""
    hf = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 9999}
    (folder / "config.json").write_text(json.dumps(hf))
    began = time.perf_counter()
    with pytest.raises(
        WeightsError, match=r"(?s)missing: model\.layers\.2.* and [0-9]+ more"
    ) as caught:
        checked_config(folder)
    assert time.perf_counter() - began < 10
    assert len(str(caught.value)) < 3000


def test_weights_of_another_name_are_none(folder):
    (folder / WHOLE).rename(folder / "pytorch_model.safetensors")
    with pytest.raises(SourceError, match=f"neither {WHOLE} nor {INDEX} is there"):
        resolve(str(folder))
