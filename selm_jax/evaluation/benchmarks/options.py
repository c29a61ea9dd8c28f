"""What the verbs of benchmarks that a judge scores share: options, costs, progress."""

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
        metavar="[MODEL]", help="Model folder, Hub id, GGUF file, or run folder (its last model)."
    ),
]
Name = Annotated[str | None, typer.Option(help="What to call the model in the files.")]


@dataclass(frozen=True)
class Judging:
    """The judge's server, and what may be spent there."""

    judge: Annotated[str | None, typer.Option(help="The judge, as its server knows it.")] = None
    base_url: Annotated[
        str | None,
        typer.Option(
            help="The judge's server: http(s)://host[:port]/v1; default: $OPENAI_BASE_URL."
        ),
    ] = None
    key_env: Annotated[
        str | None, typer.Option(help="The environment variable with the API key.")
    ] = None
    extra: Annotated[
        list[str] | None,
        typer.Option(
            help="One more field of each request, key=value (YAML); key=null leaves a field out."
        ),
    ] = None
    concurrency: Annotated[int, typer.Option(help="Judge calls under way at once.", min=1)] = 16
    cache: Annotated[
        Path | None, typer.Option(help="File of the judge's paid answers.", parser=file_to_write)
    ] = None
    max_cost: Annotated[float | None, typer.Option(help="Spend no more; needs both prices.")] = None
    price_prompt: Annotated[
        float | None, typer.Option(help="Per million tokens the judge reads.")
    ] = None
    price_completion: Annotated[
        float | None, typer.Option(help="Per million tokens it writes.")
    ] = None

    def fields(self) -> dict[str, Any]:
        """Further fields of each request.

        Raises:
          EvaluationError, ConfigError: one is no key=value, or looks like a password.
        """
        from selm_jax.evaluation.contestants import read_settings

        return read_settings(self.extra or [], "--extra")

    def client(self, folder: Path) -> Client | None:
        """The judge's client, not yet opened, with its cache in the folder; None without a judge.

        Raises:
          JudgeError: a setting that cannot be used, or the key is missing.
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
        typer.echo("nothing is left to be drawn or asked")


def exactly_one(**given: object) -> None:
    if sum(value is not None for value in given.values()) != 1:
        names = [each if each.isupper() else f"--{each}" for each in given]
        raise EvaluationError(f"give one of {', '.join(names)}")


def open_bar(title: str, total: int, unit: str):
    from selm_jax.shell.progress import bar

    return bar(console, title, total, unit)
