"""A run: an experiment at work in its folder.

Python gives a package's name to its folder once anything in it is imported, and the public function
has the same name: so the folder itself can be called, and `selm_jax.run("my.yaml")` always works.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # By its name: nothing else here may know what lies above.
        return importlib.import_module("selm_jax.api.runs").run(*arguments, **named)


sys.modules[__name__].__class__ = _Called
