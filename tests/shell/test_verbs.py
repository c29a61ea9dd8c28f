"""A verb made from a dataclass has the same command line as a function with these parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from selm_jax.shell.progress import Talk, talks
from selm_jax.shell.verbs import verb


@dataclass(frozen=True)
class Place:
    host: Annotated[str, typer.Option(help="Its name.")] = "here"
    port: Annotated[int, typer.Option("--port", "-p", min=1)] = 80


@dataclass(frozen=True, kw_only=True)
class Options:
    names: Annotated[list[str], typer.Argument(help="Who.")]
    place: Place
    token: Annotated[str, typer.Option(help="Has no default.")]
    limit: Annotated[int | None, typer.Option()] = None
    loud: Annotated[bool, typer.Option("--loud")] = False


@pytest.fixture
def call():
    app, seen = typer.Typer(), []

    @verb(app, "greet_all", needs="a voice", writes="to the air", example="greet_all ann")
    def greet(options: Options) -> None:
        """Says hello."""
        seen.append(options)

    app.command()(lambda: None)  # a second one, so that the first has to be named

    def invoke(*arguments):
        told = CliRunner().invoke(app, ["greet_all", *arguments])
        return told, (seen.pop() if seen else None)

    return invoke


def test_defaults(call):
    told, seen = call("ann", "bob", "--token", "t")
    assert told.exit_code == 0
    assert seen == Options(names=["ann", "bob"], place=Place(), token="t")


def test_all_given(call):
    _, seen = call("ann", "--host", "there", "-p", "81", "--token", "t", "--limit", "3", "--loud")
    place = Place(host="there", port=81)
    assert seen == Options(names=["ann"], place=place, token="t", limit=3, loud=True)


@pytest.mark.parametrize("wrong", [[], ["ann"], ["ann", "--token", "t", "-p", "0"]])
def test_what_typer_refuses_stays_refused(call, wrong):
    told, seen = call(*wrong)
    assert told.exit_code == 2 and seen is None


@pytest.mark.parametrize(
    ("flags", "how"),
    [([], Talk()), (["-q"], Talk(quiet=True)), (["--verbose"], Talk(verbose=True))],
)
def test_every_verb_has_one_quiet_and_one_verbose_switch(call, flags, how):
    _, seen = call("ann", "--token", "t", *flags)
    assert seen == Options(names=["ann"], place=Place(), token="t") and talks() == how


def test_help_shows_the_docstring_and_each_option(call):
    told, _ = call("--help")
    for text in (
        "Says hello.",
        "Needs: a voice.",
        "Writes: to the air.",
        "greet_all ann",
        "Who.",
        "--host",
        "Its name.",
        "--port",
        "-p",
        "--limit",
        "--loud",
    ):
        assert text in told.output


def test_two_groups_with_one_option_are_refused():
    @dataclass(frozen=True)
    class Twice:
        one: Place
        other: Place

    def work(options: Twice) -> None: ...

    work.__annotations__["options"] = Twice
    Twice.__annotations__.update(one=Place, other=Place)
    with pytest.raises(ValueError, match="duplicate parameter name: 'host'"):
        verb(typer.Typer(), needs="", writes="", example="")(work)
