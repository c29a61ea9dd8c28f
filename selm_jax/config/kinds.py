"""Defines types for settings: choices among names, dates, folders, dictionaries.

Ranges of numbers are in `shell/ranges.py`. The code that implements a choice has its own table of
the same names; a test compares those tables with the lists here.
"""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Strict, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from selm_jax.shell.paths import PathError, place
from selm_jax.shell.ranges import MOST, Range
from selm_jax.shell.user_code import UserCodeError, check_name, is_user_code

RuleName = Literal["best_worst", "swap", "top_random"]
ExploreName = Literal["greedy", "sample", "all", "random", "best", "worst"]
Ties = Literal["drop", "first"]
CutOff = Literal["keep", "drop"]
LabelKind = Literal["scores", "bradley_terry"]
ModelBased = Literal["reward_gap", "entropy"]
Design = Literal["d_optimal"]
Acquisition = Literal["random", ModelBased, Design]
OnBadRow = Literal["error", "drop"]
DuplicateIds = Literal["error", "number"]
Engine = Literal["vllm", "sglang"]
MixtureKind = Literal["geometric", "nash", "policy_reference", "dpo_mix", "pilaf"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw", "adafactor", "rmsprop"]
Remat = Literal["none", "dots", "mlp", "full"]  # from the most memory to the least
AutoRemat = Literal["auto", Remat]
Quantization = Literal["int8", "nf4"]
RolloutWeights = Literal["full", "int8"]
KeptModels = Literal["all", "last"]
ParameterDtype = Literal["float32", "bfloat16"]
Dtype = Literal["auto", ParameterDtype]
AttentionBackEnd = Literal["auto", "einsum", "blocks", "kernel"]
Preset = Literal["single", "fsdp", "fsdp_tensor"]


def agree(rule: Callable[[Any], Iterator[str]]) -> Any:
    """Turns a method that yields a group's problems as `key: problem` into a Pydantic validator."""

    def check(group: Any) -> Any:
        refuse(list(rule(group)))
        return group

    return model_validator(mode="after")(check)


def refuse(problems: list[str]) -> None:
    """Raises PydanticCustomError if there are problems, each written as `setting: problem`."""
    if problems:
        raise PydanticCustomError("contradiction", "{problems}", {"problems": problems})


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _day(value: Any) -> datetime.date:
    try:
        return value if isinstance(value, datetime.date) else datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise PydanticCustomError("day", "a date such as 2024-07-26 was expected") from None


def _folder(text: str) -> str:
    """Checks a folder path; replaces `~` by the home folder and keeps other paths as written."""
    try:
        path = place(text)
    except PathError as e:
        raise PydanticCustomError("path", "{problem}", {"problem": str(e)}) from None
    return str(path) if text.startswith("~") else text


def _or_yours(value: Any, built_in: Callable[[Any], Any]) -> Any:
    return value if isinstance(value, str) and is_user_code(value) else built_in(value)


def _yours(name: str) -> str:
    try:
        check_name(name)
    except UserCodeError as e:
        raise PydanticCustomError("yours", "{problem}", {"problem": str(e)}) from None
    return name


def _finite(settings: dict[str, Any]) -> dict[str, Any]:
    refuse([f"{key}: {value}, a finite number was expected" for key, value in _infinite(settings)])
    return settings


def _infinite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yields all NaN and infinite numbers in nested settings, with their dotted keys."""
    if isinstance(value, Mapping | list):
        for name, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _infinite(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, value


def _named_loss(objective: dict[str, Any]) -> dict[str, Any]:
    loss = objective.get("loss")
    if not isinstance(loss, str):
        found = f"{loss!r} is not a name" if "loss" in objective else "missing"
        refuse([f"loss: {found}; give the name of a loss, such as `selm` or `dpo`"])
    if objective.get("alpha") == []:
        refuse(["alpha: an empty list; give one value for all iterations, or one per iteration"])
    return objective


def objective_at(objective: Mapping[str, Any], iteration: int) -> dict[str, Any]:
    """The loss and its settings in an iteration, counted from 1: `alpha` may be a list."""
    alpha = objective.get("alpha")
    if not isinstance(alpha, list):
        return dict(objective)
    return {**objective, "alpha": alpha[0] if len(alpha) == 1 else alpha[iteration - 1]}


def _command(text: str) -> str:
    """Checks a command that starts a server with the policy's folder in place of {model}."""
    try:
        parts = shlex.split(text)
    except ValueError as e:
        raise PydanticCustomError("command", "{problem}", {"problem": str(e)}) from None
    if not any("{model}" in part for part in parts[1:]):
        expected = "expected a program and {model} among its arguments, for the policy's folder"
        raise PydanticCustomError("command", "{expected}", {"expected": expected})
    return text


def fixed_length(row_length: int | Literal["auto"]) -> int | None:
    """The tokens of a row if `training.row_length` is a number; None if it is `auto`."""
    return None if row_length == "auto" else row_length


def most_in_row(row_length: int | Literal["auto"], positions: int) -> int:
    """The most tokens that an example in a row may have, by the setting and the model's positions.

    Rows with `auto` are as long as their examples need, so only the positions bound them.
    """
    return min(fixed_length(row_length) or positions, positions)


Flag = Annotated[bool, Strict()]  # 1 and "yes" are refused
OrYours = WrapValidator(_or_yours)  # a built-in name, or package.module:function
Yours = Annotated[str, AfterValidator(_yours)]  # package.module:function
Day = Annotated[datetime.date, BeforeValidator(_day)]
Folder = Annotated[str, AfterValidator(_folder)]
Command = Annotated[str, AfterValidator(_command)]
Free = Annotated[dict[str, Any], AfterValidator(_finite)]  # the code that uses it checks the keys
Loss = Annotated[Free, AfterValidator(_named_loss)]
All = Annotated[int, Range(1, MOST, whole=True, advice="null takes all")]  # a limit
Size = Annotated[int, Range(1, 2**20, whole=True)]  # an array's size along one axis
# A size that `auto` fits to the data and to the memory.
AutoSize = Annotated[int | Literal["auto"], Range(1, 2**20, whole=True, words=("auto",))]
Rate = Annotated[float, Range(0, 1, above=True)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(_several)]  # a single one is for all iterations
Decay = Annotated[float, Range(0, 1, below=True)]  # of a moving average over updates
