"""The examples in the docstrings of what is public, and of the pure core, give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import selm_jax

PACKAGES = ("api", "objectives", "preferences")
MODULES = ["rollout.sampling"] + [
    f"{package}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules([f"{selm_jax.__path__[0]}/{package}"])
]
# These have examples that a reader looks for; the others may.
SHOWN = {
    *("api.prompts", "api.ranking", "objectives.build", "objectives.selm", "objectives.logprobs"),
    "objectives.losses",
    *("preferences.examples", "preferences.packing", "preferences.selection", "rollout.sampling"),
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"selm_jax.{name}")
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted or name not in SHOWN, f"selm_jax/{name} shows no example any more"
