"""Verbs of the command line whose options are the fields of a dataclass.

    @dataclass(frozen=True)
    class Loading:
        dtype: Annotated[str, typer.Option(help="...")] = "auto"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        model: Annotated[str, typer.Argument(help="...")]
        loading: Loading

    @verb(app)
    def measure(options: Options) -> None: ...

makes `measure MODEL --dtype ...`. A field that is a dataclass is a group of options, so verbs that
share a group define its options once, and hand it on as one value.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

import typer

Work = TypeVar("Work", bound=Callable[[Any], None])


def verb(app: typer.Typer, name: str | None = None) -> Callable[[Work], Work]:
    """Decorates a function of one dataclass: it becomes a verb of `app`, described by its docstring.

    Args:
      name: of the verb; default: the function's.
    """

    def register(work: Work) -> Work:
        (parameter,) = inspect.signature(work, eval_str=True).parameters.values()
        options = parameter.annotation
        parameters = list(_parameters(options))

        def called(**given: Any) -> None:
            work(_collected(options, given))

        called.__name__, called.__doc__ = work.__name__, work.__doc__
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        called.__signature__ = inspect.Signature(parameters)  # typer reads this one
        app.command(name or work.__name__)(called)
        return work

    return register


def _fields(options: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    hints = get_type_hints(options, include_extras=True)
    return ((field, hints[field.name]) for field in dataclasses.fields(options))


def _parameters(options: type) -> Iterator[inspect.Parameter]:
    """A parameter for each field, and for each field of its groups."""
    for field, kind in _fields(options):
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
            yield from _parameters(kind)
        else:
            required = field.default is dataclasses.MISSING
            yield inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, annotation=kind,
                default=inspect.Parameter.empty if required else field.default,
            )  # fmt: skip


def _collected(options: type, given: Mapping[str, Any]) -> Any:
    """The dataclass, of what the command line gave."""
    fields = {
        field.name: _collected(kind, given)
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind)
        else given[field.name]
        for field, kind in _fields(options)
    }
    return options(**fields)
