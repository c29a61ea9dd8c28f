"""transformers loads exactly what was trained here: every family, one real update, one folder."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from selm_jax.models.decoder import Decoder, abstract_params
from selm_jax.models.families import read_config
from selm_jax.objectives.build import build_objective
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import common_shape, pack
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import Shardings, make_update
from selm_jax.weights.export import convert_dtype, export_folder
from selm_jax.weights.files import WeightsError
from selm_jax.weights.huggingface import load

FAMILIES = Path(__file__).parents[1] / "golden" / "families"
_spec = importlib.util.spec_from_file_location("golden_families", FAMILIES.parent / "families.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
TIME = 120
QUICK = ("gemma-3", "llama-3.1", "phi-3-128k")  # the others are slow tests


def trained(name: str, mesh=None):
    """The checkpoint after one SELM update large enough to change its outputs."""
    config = read_config(FAMILIES / name).for_length(TIME)
    rng = np.random.default_rng(0)

    def some(n):
        return tuple(int(x) for x in rng.integers(0, 96, n))

    roles = {"chosen": 0, "rejected": 1, "explore": 2}
    examples = [
        Example(f"x{i}", some(20), (some(9), some(12), some(7)), roles, (-30.0, -40.0, -20.0))
        for i in range(3)
    ]
    step = optimizer("adamw", b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0)
    where = None if mesh is None else shardings(abstract_params(config), mesh, TRAINING)
    update = make_update(
        Decoder(config, remat="full", mesh=mesh),
        build_objective("selm", beta=0.1, alpha=0.1),
        step,
        chunk=16,
        shardings=Shardings(where),
    )
    (batch,) = pack(examples, common_shape([examples], rows=4, time=TIME))
    batch = batch if mesh is None else place_rows(batch, mesh)
    params = load(FAMILIES / name, config, shardings=where)
    gradients, sums = update.gradients(params, batch, np.array([9, 12, 7], np.float32))
    state, _ = update.apply(TrainState.create(params, step), gradients, sums, np.float32(0.01))
    return config, state.params


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(p.name for p in FAMILIES.iterdir() if p.is_dir())
    ],
)
def test_transformers_loads_a_trained_policy_and_gives_our_logits(
    name, all_logits, parity, tmp_path
):
    parity(name, "trained", compared(name, *trained(name), all_logits, tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_trained_on_a_mesh_are_loaded_by_transformers(name, all_logits, tmp_path):
    """Four by two devices, half of the experts on each of two; the update is that of one device."""
    config, params = trained(name, make_mesh((1, 4, 2)))
    assert params["layers"]["experts"]["gate"].sharding.spec[1] == "tensor"
    compared(name, config, params, all_logits, tmp_path / "model")
    # A hundredth of a step: Adam's first step divides a gradient by its own size, so that it shows
    # the rounding of those that are nearly zero.
    near = partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(near, params, trained(name)[1])


def compared(name, config, params, all_logits, folder) -> float:
    """Exports the parameters; the largest difference of transformers' logits from ours."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    # Several files, so that the index is used too.
    export_folder(params, config, FAMILIES / name, folder, "# card\n", max_shard_bytes=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    theirs, loading = golden.read(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(1).integers(0, 96, (2, TIME)).astype(np.int32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    run = jax.jit(partial(all_logits, Decoder(config)))
    ours = np.asarray(run(params, tokens))
    moved = np.abs(ours - run(load(FAMILIES / name, config), tokens)).max()
    assert moved > 0.1, "the update has changed nothing that a test could see"
    difference = float(np.abs(ours - expected).max())
    assert difference <= 2e-4
    return difference


def test_a_copy_in_another_dtype_is_the_same_rounded(tmp_path):
    config, params = trained("llama-2")
    export_folder(params, config, FAMILIES / "llama-2", tmp_path / "model", "# card\n")
    convert_dtype(tmp_path / "model", tmp_path / "small", "bfloat16")
    small = load(tmp_path / "small", config)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x.astype("bfloat16").astype("float32"), y),
        params,
        small,
    )
    hf = json.loads((tmp_path / "small" / "config.json").read_text())
    assert {hf.get("dtype", "bfloat16"), hf.get("torch_dtype", "bfloat16")} == {"bfloat16"}
    with pytest.raises(WeightsError, match="'int4'; expected one of float32, float16, bfloat16"):
        convert_dtype(tmp_path / "model", tmp_path / "other", "int4")
    assert not (tmp_path / "other").exists()
