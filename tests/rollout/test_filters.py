"""A sampler filter of the user's is looked at before anything is generated."""

import importlib
import sys

import pytest

from selm_jax.rollout.filters import FilterError, filter_named

MODULE = """
import jax.numpy as jnp

def good(logits, t):
    return jnp.where(logits > 0, logits, -jnp.inf)

def one(logits):
    return logits

def branches(logits, t):
    return logits if logits[0, 0] > 0 else -logits

def best(logits, t):
    return logits.argmax(-1)

def narrow(logits, t):
    return logits[:, :5]

def half(logits, t):
    return logits.astype(jnp.bfloat16)

def several(logits, t):
    return logits, t

def nothing(logits, t):
    return None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "filters_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "filters_of_mine"
    sys.modules.pop("filters_of_mine", None)


def test_a_filter_by_its_name(module):
    assert filter_named(f"{module}:good", 30).__name__ == "good"


@pytest.mark.parametrize(
    "name,what",
    [
        ("missing", "has no 'missing'"),
        ("one", r"one\(logits\); expected one that can be called as one\(logits, t\)"),
        ("branches", "branches .*filters_of_mine.py.* cannot be traced by JAX: Tracer"),
        ("best", "returned .*int32.* expected logits of the same shape"),
        ("narrow", "returned .*1, ?5.* expected logits of the same shape"),
        ("half", "returned .*bfloat16.* expected logits of the same shape"),
        ("several", "expected logits of the same shape"),
        ("nothing", "returned None"),
    ],
)
def test_what_is_none_is_refused(module, name, what):
    with pytest.raises(FilterError, match=f"rollout.filter .*{what}"):
        filter_named(f"{module}:{name}", 30)
