"""Imports a user's function that an experiment names as `package.module:function`.

An experiment that names functions is a program; these rules keep it from calling code that was not
written for this purpose, such as `os:system`. The function must be written in Python and defined in
the named module itself. The module must not belong to Python, to this program, or to an installed
package that does not require this program. Nothing else in this program imports by name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

from selm_jax.shell.words import did_you_mean

FORM = "package.module:function"


class UserCodeError(ValueError):
    """A setting does not name a function that the user wrote."""


def is_user_code(name: str) -> bool:
    """Returns whether a name, or a sum of names such as `dpo+x:y`, refers to a user's function."""
    return ":" in name


def function_at(path: str, *parameters: str) -> FunctionType:
    """Imports the user's function that is named as `package.module:function`.

    Args:
        parameters: names of the positional arguments that it will be called with; without any, its
            signature is not checked.

    Raises:
        UserCodeError: the name has another form, the module is not the user's or cannot be
            imported, or it defines no such Python function with these parameters.
    """
    check_name(path)
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module's own code can raise anything
        raise UserCodeError(
            f"importing {module_name!r} raised {type(error).__name__}: {error}. If the module was "
            "not found, add its folder to PYTHONPATH"
        ) from error
    where = f"{module_name} ({getattr(module, '__file__', None)})"
    if not hasattr(module, name):
        public = [each for each in vars(module) if not each.startswith("_")]
        raise UserCodeError(f"{where} has no {name!r}{did_you_mean(name, public)}")
    function = getattr(module, name)
    if not isinstance(function, FunctionType):
        raise UserCodeError(
            f"{name!r} in {where} is a {type(function).__name__}; expected a Python function, "
            "written with `def`"
        )
    if function.__module__ != module.__name__:
        raise UserCodeError(
            f"{name!r} is defined in {function.__module__}; expected a function that {where} "
            "defines itself. Name the module that defines it"
        )
    signature = inspect.signature(function)
    try:
        _ = signature.bind(*parameters) if parameters else None
    except TypeError as error:
        raise UserCodeError(
            f"the function is {name}{signature}; expected one that can be called as "
            f"{name}({', '.join(parameters)}): {error}"
        ) from error
    return function


def described(function: Callable[..., Any]) -> str:
    """A function's name for messages: `my_rules:polite (my_rules.py)`."""
    code = getattr(function, "__code__", None)
    where = f" ({code.co_filename})" if code is not None else ""
    return f"{function.__module__}:{getattr(function, '__name__', function)}{where}"


def check_name(path: str) -> None:
    """Checks the name of a user's function as far as possible without importing anything.

    Raises:
        UserCodeError: the name has another form than `package.module:function`, or the package
            is not the user's.
    """
    module_name, _, name = path.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserCodeError(f"expected the form {FORM!r}")
    package = module_name.partition(".")[0]
    yours = f"Put your function into a file of your own and name it as {FORM}"
    if package in sys.stdlib_module_names or package == "__main__":
        raise UserCodeError(f"{package!r} is part of Python. {yours}")
    if package == __name__.partition(".")[0]:
        raise UserCodeError(f"{package!r} is this program, not a file of yours. {yours}")
    if not _is_installed(package):
        return
    for name in metadata.packages_distributions().get(package, []):
        if any(each.startswith(("selm_jax", "selm-jax")) for each in metadata.requires(name) or []):
            return
    raise UserCodeError(
        f"{package!r} is an installed package that was not made for this program: its metadata "
        f"does not require selm_jax. {yours}; your function may call that package"
    )


def source_digest(path: str) -> str:
    """SHA-256 of the present content of the file that defines `package.module:function`.

    Modules that this file imports are not included.

    Raises:
        UserCodeError: there is no such file.
    """
    module = path.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a package around it that is not there
        found = None
    file = Path(found.origin) if found is not None and found.origin else None
    if file is None or not file.is_file():
        raise UserCodeError(
            f"{path!r}: no file of the module {module!r} was found. Add its folder to PYTHONPATH"
        )
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_installed(package: str) -> bool:
    """Returns whether a package is in a folder where installers put packages."""
    if package in sys.modules:
        module = sys.modules[package]
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    else:
        found = importlib.util.find_spec(package)  # for a top-level name this imports nothing
        places = [found.origin, *(found.submodule_search_locations or ())] if found else []
    return any(
        {"site-packages", "dist-packages"} & set(Path(each).parts) for each in places if each
    )
