"""A run: an experiment and the folder that it writes to.

`selm_jax.run` is both this package and a public function. Python binds the name to the package as
soon as anything in it is imported, so the package is callable: `selm_jax.run("my.yaml")` always
works.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    """A module that can be called like the public function of the same name."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # Imported by name, because this package must not depend on the API above it.
        return importlib.import_module("selm_jax.api.runs").run(*arguments, **named)


sys.modules[__name__].__class__ = _Called
