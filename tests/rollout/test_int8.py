"""Generation with 8-bit kernels: how they are rounded, sharded, and how far the sampler is off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from selm_jax.models.decoder import Decoder, abstract_params
from selm_jax.models.quantize import dequantize
from selm_jax.parallel.mesh import decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import OneShape
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.gap import gap_of
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.training.scoring import Scorer, readers

pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")


def is_integers(x) -> bool:
    return hasattr(x, "qvalue")


def test_each_output_has_one_scale_and_is_rounded_to_the_nearest_of_its_steps(tiny, random_params):
    params = random_params(tiny())
    full, rounded = (
        decoding_params(params, jnp.float32, weights=weights) for weights in ("full", "int8")
    )
    exact, back = flatten_dict(full), flatten_dict(dequantize(rounded))
    kernels = {path for path, x in flatten_dict(rounded).items() if is_integers(x)}
    assert {path[-1] for path in kernels} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert len(kernels) == 2 * 7
    for path, x in exact.items():
        if path not in kernels:
            np.testing.assert_array_equal(back[path], x)
            continue
        inputs = (0, 1) if path[-1] == "o" else (0,)
        step = np.abs(x).max((0,), keepdims=True) / 127.5
        if path[-1] == "o":  # the outputs of each head have scales of their own
            step = np.abs(x).max((1,), keepdims=True) / 127.5
        assert np.abs(back[path] - x).max() > 0
        assert (np.abs(back[path] - x) <= step * 0.501 + 1e-7).all()
        assert flatten_dict(rounded)[path].qvalue.dtype == jnp.int8
        assert flatten_dict(rounded)[path].scale.size <= x.size / x.shape[inputs[-1]]


def test_the_gap_to_the_scorer_is_small_and_there(tiny, random_params):
    config = tiny()
    stacked = random_params(config)
    params = decoding_params(stacked, jnp.float32, weights="int8")
    engine = Engine(
        Decoder(config, scan=False, quantized=True), Sampling(), slots=8, max_prompt=16,
        max_new_tokens=8, stop_ids=(5,),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    requests = [Request(i, tuple(rng.integers(0, 96, 9).tolist()), 1, 3) for i in range(4)]
    found = engine.generate(params, requests, seed=3, iteration=1)
    examples = [Example("p", requests[r.index].prompt, (r.tokens,), {}) for r in found]
    scorer = Scorer(readers(Decoder(config), 8), lambda batch: batch, OneShape(4, None))
    scored = [of.logprob for (of,) in scorer.statistics(stacked, examples)]
    gap = gap_of((np.array(r.logps), s) for r, s in zip(found, scored, strict=True))
    assert gap is not None and 1e-4 < gap.mean < 0.1


@pytest.mark.parametrize("tensor", [1, 2])
def test_integers_and_scales_are_cut_over_devices_as_the_kernels_are(tensor, tiny, random_params):
    config = tiny()
    mesh = make_mesh((1, 4 // tensor, tensor), jax.devices()[:4])
    copies = decode_mesh(mesh, tensor)
    at = shardings(abstract_params(config), mesh, TRAINING)
    params = jax.tree.map(jax.device_put, random_params(config), at)
    full, int8 = (
        decoding_params(params, jnp.float32, decoding_shardings(config, copies, weights), weights)
        for weights in ("full", "int8")
    )
    alone = decoding_params(random_params(config), jnp.float32, weights="int8")
    for path, x in flatten_dict(full).items():
        found = flatten_dict(int8)[path]
        if is_integers(found):
            assert found.qvalue.sharding.is_equivalent_to(x.sharding, x.ndim), path
            np.testing.assert_array_equal(found.qvalue, flatten_dict(alone)[path].qvalue)
            found = found.scale
            assert max(found.sharding.shard_shape(found.shape)) <= max(found.shape)
            np.testing.assert_array_equal(found, flatten_dict(alone)[path].scale)
