"""Weights in mxfp4: decoded exactly, read in parts by the devices of a mesh, exported in full."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_of import write_of

from selm_jax.models.config import Clamp, LayerKind, Mixture, Rope, UnsupportedModel
from selm_jax.models.decoder import Decoder, abstract_params
from selm_jax.models.families import read_config, to_hf
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.weights.export import export_folder
from selm_jax.weights.files import (
    Checkpoint,
    Stored,
    WeightsError,
    open_checkpoint,
    stored_like,
    write,
)
from selm_jax.weights.gguf import convert
from selm_jax.weights.huggingface import load, save, to_hf_tensors
from selm_jax.weights.multimodal import open_text
from selm_jax.weights.mxfp4 import decode, in_full

_file = Path(__file__).parents[1] / "golden" / "families.py"
_spec = importlib.util.spec_from_file_location("golden_families", _file)
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

PACKED = ("gate_up_proj", "down_proj")


def slowly(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[..., blocks, 16] and [..., blocks] -> [..., 32 * blocks], by the definition, in Python."""

    def number(nibble: int, scale: int) -> float:
        sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        return (-1) ** sign * magnitude * 2.0 ** (scale - 127)

    found = np.zeros((*scales.shape, 32))
    for at in np.ndindex(scales.shape):
        for i, byte in enumerate(blocks[at].tolist()):
            for half, nibble in enumerate((byte & 15, byte >> 4)):
                found[(*at, 2 * i + half)] = number(nibble, int(scales[at]))
    return found.reshape(*scales.shape[:-1], -1)


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(
        kinds=(LayerKind(Rope(1e4), 8), LayerKind(Rope(1e4))),
        architecture="GptOssForCausalLM", embed=64, mlp=32, heads=4, kv_heads=2, head_dim=16,
        mixture=Mixture(4, 2, True, biases=True, clamp=Clamp(1.702, 7.0)), sinks=True,
        qkv_bias=True, out_bias=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def packed(config, random_params, tmp_path_factory):
    """A folder with random experts in mxfp4, and these experts, decoded slowly."""
    folder = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    values = dict(to_hf_tensors(random_params(config), config))
    experts = {}
    for name in [name for name in values if name.endswith(PACKED)]:
        count, inputs, outputs = values.pop(name).shape
        blocks = rng.integers(0, 256, (count, outputs, inputs // 32, 16), dtype=np.uint8)
        scales = rng.integers(122, 126, blocks.shape[:-1], dtype=np.uint8)
        values |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        experts[name] = slowly(blocks, scales).swapaxes(1, 2)
    written(folder, config, values)
    return folder, experts


def written(folder, config, values) -> None:
    def stored(x):
        return Stored(x.shape, "U8") if x.dtype == np.uint8 else stored_like(x.shape, x.dtype)

    write(folder, {name: stored(x) for name, x in values.items()}, values.items())
    hf = to_hf(config) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(hf))


def test_every_number_with_every_scale_is_exact():
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (255, 16, 16))
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (255, 16))
    found, expected = np.float64(decode(blocks, scales)), slowly(blocks, scales)
    large = np.abs(expected) >= 2.0**128  # more than bfloat16 has
    assert np.isinf(found[large]).all() and 0 < large.sum() < 2000
    np.testing.assert_array_equal(found[~large], expected[~large])
    assert np.isnan(np.float32(decode(blocks[:1], np.full_like(scales[:1], 255)))).all()


def test_numbers_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (3, 8, 2, 16), dtype=np.uint8)
    scales = rng.integers(1, 250, (3, 8, 2), dtype=np.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    ours = np.stack([np.float32(decode(*each)).T for each in zip(blocks, scales, strict=True)])
    np.testing.assert_array_equal(ours, theirs.float().numpy())


@pytest.mark.parametrize("mesh", [None, (1, 4, 2)])
def test_experts_are_read_exactly_also_in_parts(mesh, config, packed):
    folder, experts = packed
    assert read_config(folder) == config
    where = None if mesh is None else shardings(abstract_params(config), make_mesh(mesh), TRAINING)
    params = load(folder, config, shardings=where)
    found = dict(to_hf_tensors(params, config))
    for name, expected in experts.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_any_part_of_a_tensor_is_that_part_of_the_whole(packed):
    folder, experts = packed
    checkpoint = in_full(open_checkpoint(folder))
    (name, whole), *_ = experts.items()
    assert checkpoint.tensors[name] == Stored(whole.shape, "BF16")
    cuts = [(), (slice(1, 3),), (slice(0, 4), slice(7, 50), slice(1, 64, 2)), (slice(2, 3),) * 3]
    for cut in cuts:
        np.testing.assert_array_equal(np.float64(checkpoint.read(name, cut)), whole[cut])
    assert checkpoint.bytes_of(name).nbytes == 2 * whole.size
    norm = "model.norm.weight"
    np.testing.assert_array_equal(checkpoint.read(norm), open_checkpoint(folder).read(norm))


class Counted:
    """Counts the bytes that are read from a file."""

    filename = "model.safetensors"

    def __init__(self, values: np.ndarray):
        self.values, self.fetched = values.reshape(-1), 0

    def __getitem__(self, span: slice) -> np.ndarray:
        self.fetched += span.stop - span.start
        return self.values[span]


def test_devices_that_cut_the_same_experts_fetch_them_once(packed):
    folder, experts = packed
    plain, name = open_checkpoint(folder), next(iter(experts))
    files = {n: Counted(plain.read(n)) for n in (f"{name}_blocks", f"{name}_scales")}
    where: Any = {n: (file, 0, plain.tensors[n]) for n, file in files.items()}
    checkpoint = in_full(Checkpoint(folder, where))
    for begin in (0, 16, 32, 48):
        cut = slice(0, 4), slice(begin, begin + 16)
        found = np.float64(checkpoint.read(name, cut))
        np.testing.assert_array_equal(found, experts[name][cut])
    for file in files.values():
        assert file.fetched == file.values.size


def test_the_text_model_of_a_multi_modal_folder_may_be_packed(packed, tmp_path):
    """No family has such a folder yet, but it is opened like any other."""
    folder, experts = packed
    plain, name = open_checkpoint(folder), next(iter(experts))
    values = {
        f"language_model.{n}": plain.read(n).copy() for n in (f"{name}_blocks", f"{name}_scales")
    }
    write(tmp_path, {n: Stored(x.shape, "U8") for n, x in values.items()}, values.items())
    images = Path(__file__).parents[1] / "golden" / "families" / "gemma-3-images"
    (tmp_path / "config.json").write_text((images / "config.json").read_text())
    found = np.float64(open_text(tmp_path).read(name))
    np.testing.assert_array_equal(found, experts[name])


@pytest.mark.parametrize("said", [{"load_in_4bit": False}, {"quant_method": "other"}, None])
def test_the_model_card_goes_by_the_tensors(said, config, packed, tmp_path):
    """Whatever `quantization_config` says, which a copy in full may have kept."""
    source, _ = packed
    params = load(source, config)
    hf = json.loads((source / "config.json").read_text()) | {"quantization_config": said}
    in_parts, whole = tmp_path / "in parts", tmp_path / "whole"
    shutil.copytree(source, in_parts)
    export_folder(params, config, source, whole, "")
    for start, told in ((in_parts, True), (whole, False)):
        (start / "config.json").write_text(json.dumps(hf))
        export_folder(params, config, start, out := tmp_path / f"from {start.name}", "# card\n")
        assert ("its weights in mxfp4" in (out / "README.md").read_text()) == told


def test_an_export_is_in_full_and_says_so(config, packed, tmp_path, all_logits):
    folder, _ = packed
    params = load(folder, config)
    export_folder(params, config, folder, tmp_path / "model", "# card\n")
    hf = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in hf and hf["torch_dtype"] == "float32"
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("# card\n") and "its weights in mxfp4. These are all in float32" in card
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model", config), params)
    torch = pytest.importorskip("torch")
    tokens = np.random.default_rng(2).integers(0, 96, (2, 30)).astype(np.int32)
    ours = jax.jit(partial(all_logits, Decoder(config)))(params, tokens)
    for each in (folder, tmp_path / "model"):  # transformers decodes the first one itself
        with torch.no_grad():
            theirs = golden.read(each)(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_what_is_no_mxfp4_is_refused(config, packed, tmp_path):
    folder, experts = packed
    checkpoint = open_checkpoint(folder)

    def values_of(name):
        kind = checkpoint.tensors[name]
        return checkpoint.read(name).reshape(kind.shape).copy()

    values = {name: values_of(name) for name in checkpoint.tensors}
    (name, _), *_ = experts.items()
    without = {k: v for k, v in values.items() if k != f"{name}_scales"}
    nan = values | {f"{name}_scales": np.full_like(values[f"{name}_scales"], 255)}
    for case, changed, message in [
        ("without", without, rf"{name}_blocks is .*, and {name}_scales is None; mxfp4 has bytes"),
        ("nan", nan, rf"NaN or infinity:\n  {name}, in model.safetensors"),
    ]:
        (tmp_path / case).mkdir()
        written(tmp_path / case, config, changed)
        with pytest.raises(WeightsError, match=message):
            load(tmp_path / case, config)
    hf = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(hf | {"quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(UnsupportedModel, match="quant_method 'awq'; a gpt_oss model may have"):
        read_config(tmp_path)


def test_a_gguf_file_has_the_same_numbers_in_another_order(packed, config, tmp_path):
    expected = load(packed[0], config)
    (full := tmp_path / "full").mkdir()
    save(expected, config, full)
    (full / "config.json").write_text(json.dumps(to_hf(config)))
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    kind = GGMLQuantizationType.MXFP4
    out = convert(write_of(full, tmp_path / "m.gguf", rope, experts=kind)[0], tmp_path / "out")
    assert read_config(out) == config
    assert (tmp_path / "m.gguf").stat().st_size < (full / "model.safetensors").stat().st_size
    jax.tree.map(np.testing.assert_array_equal, load(out, config), expected)
