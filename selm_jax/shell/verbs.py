"""Defines command-line commands whose options are the fields of a dataclass.

    @dataclass(frozen=True)
    class Loading:
        dtype: Annotated[str, typer.Option(help="...")] = "auto"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        model: Annotated[str, typer.Argument(help="...")]
        loading: Loading

    @verb(app, needs="a model", writes="a table to the terminal", example="selm measure my_model")
    def measure(options: Options) -> None: ...

makes `measure MODEL --dtype ...`. A field that is a dataclass is a group of options, so commands
that share a group define its options once and pass it on as one value. The help of every command
says what it needs, what it writes and how it is called. All have `--quiet` and `--verbose`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from selm_jax.shell.progress import Talk, talk

Work = TypeVar("Work", bound=Callable[[Any], None])

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show results and errors, but no progress.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show tracebacks, and which programs are compiled.")
]


def verb(
    app: typer.Typer,
    name: str | None = None,
    *,
    needs: str,
    writes: str,
    example: str,
    hidden: bool = False,
) -> Callable[[Work], Work]:
    """Adds a function of one options dataclass to `app` as a command; its docstring is the help.

    Args:
      name: the command's name; by default the function's name.
      needs, writes: what must exist, and where the result goes. Each ends a sentence of the help.
      example: a complete command line, for the help.
      hidden: whether `--help` of the program leaves the command out.
    """

    def register(work: Work) -> Work:
        (parameter,) = inspect.signature(work, eval_str=True).parameters.values()
        options = parameter.annotation
        parameters = [*_parameters(options), *_TALK]

        def called(**given: Any) -> None:
            talk(Talk(quiet=given.pop("quiet"), verbose=given.pop("verbose")))
            work(_collected(options, given))

        called.__name__ = work.__name__
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        called.__signature__ = inspect.Signature(parameters)  # typer reads this one
        doc = inspect.cleandoc(work.__doc__ or "")
        help = f"{doc}\n\nNeeds: {needs}.\n\nWrites: {writes}.\n\n\b\nExample:\n  {example}"
        app.command(name or work.__name__, help=help, hidden=hidden)(called)
        return work

    return register


_TALK = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=False)
    for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
]


def _fields(options: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    hints = get_type_hints(options, include_extras=True)
    return ((field, hints[field.name]) for field in dataclasses.fields(options))


def _parameters(options: type) -> Iterator[inspect.Parameter]:
    """Yields a function parameter for each option: each field, and each field of a group."""
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
    """Makes the options dataclass from the values that the user gave on the command line."""
    fields = {
        field.name: _collected(kind, given)
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind)
        else given[field.name]
        for field, kind in _fields(options)
    }
    return options(**fields)
