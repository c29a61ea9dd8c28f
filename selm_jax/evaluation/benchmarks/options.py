"""Options, cost tables and progress bars for the benchmarks that a judge scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.cost import Cost, show
from selm_jax.shell.paths import file_to_write
from selm_jax.shell.progress import terminal

if TYPE_CHECKING:
    from selm_jax.feedback.judge.client import Client

console = terminal(stderr=True)

OptionalSource = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Model folder, Hub id, GGUF file, or run folder (its last model).",
        show_default="the files that options name",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="Name for the model in the result files.", show_default="the model's own"),
]


@dataclass(frozen=True)
class Judging:
    """Options for a benchmark's judge, its server, and a limit on spending."""

    judge: Annotated[
        str | None,
        typer.Option(
            help="Name of the judge's model on its server.", show_default="no judge is asked"
        ),
    ] = None
    base_url: Annotated[
        str | None,
        typer.Option(
            help="The judge's server: http(s)://host[:port]/v1.",
            show_default="$OPENAI_BASE_URL",
        ),
    ] = None
    key_env: Annotated[
        str | None,
        typer.Option(
            help="Name of the environment variable with the API key.", show_default="no key is sent"
        ),
    ] = None
    extra: Annotated[
        list[str] | None,
        typer.Option(
            help="Extra field for each request to the judge as key=value (YAML); key=null removes "
            "a field.",
            show_default="no field",
        ),
    ] = None
    concurrency: Annotated[
        int, typer.Option(help="Maximum number of simultaneous requests to the judge.", min=1)
    ] = 16
    cache: Annotated[
        Path | None,
        typer.Option(
            help="File that caches the judge's answers, so that no answer is paid for twice.",
            metavar="FILE",
            parser=file_to_write,
            show_default="judge.sqlite in the folder of results",
        ),
    ] = None
    max_cost: Annotated[
        float | None,
        typer.Option(
            help="Maximum dollars to spend on the judge. Needs both --price options.",
            show_default="no limit",
        ),
    ] = None
    price_prompt: Annotated[
        float | None,
        typer.Option(
            help="Dollars per million tokens that the judge reads.", show_default="unknown"
        ),
    ] = None
    price_completion: Annotated[
        float | None,
        typer.Option(
            help="Dollars per million tokens that the judge writes.", show_default="unknown"
        ),
    ] = None

    def fields(self) -> dict[str, Any]:
        """Parses --extra: further fields for each request to the judge.

        Raises:
          EvaluationError, ConfigError: a field is not key=value, or looks like a password.
        """
        from selm_jax.evaluation.contestants import read_settings

        return read_settings(self.extra or [], "--extra")

    def client(self, folder: Path) -> Client | None:
        """Makes the judge's client, with its cache in `folder`; None without a judge.

        Raises:
          JudgeError: a setting cannot be used, or the key is missing.
        """
        from selm_jax.feedback.judge.budget import Budget
        from selm_jax.feedback.judge.client import Client

        if self.judge is None:
            return None
        budget = Budget(None, self.max_cost, self.price_prompt, self.price_completion)
        return Client(
            self.judge, cache=self.cache or folder / "judge.sqlite", base_url=self.base_url,
            key_env=self.key_env, concurrency=self.concurrency, budget=budget,
        )  # fmt: skip


def show_costs(costs: list[Cost]) -> None:
    left = [cost for cost in costs if cost.answers or cost.judge_calls]
    if left:
        show(left, console)
    else:
        typer.echo("there is nothing to pay for: all answers and judgments exist already")


def exactly_one(**given: object) -> None:
    if sum(value is not None for value in given.values()) != 1:
        names = [each if each.isupper() else f"--{each}" for each in given]
        raise EvaluationError(f"give exactly one of {', '.join(names)}")


def open_bar(title: str, total: int, unit: str):
    from selm_jax.shell.progress import bar

    return bar(console, title, total, unit)
