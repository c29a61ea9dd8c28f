"""Options that `selm eval alpaca_eval` and `selm eval mt_bench` share, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.cost import Cost, show
from selm_jax.shell.paths import file_to_write, folder_to_write
from selm_jax.shell.progress import terminal

console = terminal(stderr=True)

OptionalSource = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="Model folder, Hub id, GGUF file, or run folder (its last model)."
    ),
]
Name = Annotated[str | None, typer.Option(help="What to call the model in the files.")]
Judge = Annotated[str | None, typer.Option(help="The judge, as its server knows it.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(help="The judge's server: http(s)://host[:port]/v1; default: $OPENAI_BASE_URL."),
]
KeyEnv = Annotated[str | None, typer.Option(help="The environment variable with the API key.")]
Concurrency = Annotated[int, typer.Option(help="Judge calls under way at once.", min=1)]
Cache = Annotated[
    Path | None, typer.Option(help="File of the judge's paid answers.", parser=file_to_write)
]
MaxCost = Annotated[float | None, typer.Option(help="Spend no more; needs both prices.")]
PricePrompt = Annotated[float | None, typer.Option(help="Per million tokens the judge reads.")]
PriceCompletion = Annotated[float | None, typer.Option(help="Per million tokens it writes.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Folder; default: evaluations/MODEL/VERB.", parser=folder_to_write
    ),
]


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


def open_client(
    judge: str,
    cache: Path,
    base_url: str | None,
    key_env: str | None,
    concurrency: int,
    max_cost: float | None,
    price_prompt: float | None,
    price_completion: float | None,
):
    from selm_jax.feedback.judge.budget import Budget
    from selm_jax.feedback.judge.client import Client

    budget = Budget(None, max_cost, price_prompt, price_completion)
    return Client(judge, cache=cache, base_url=base_url, key_env=key_env,
                  concurrency=concurrency, budget=budget)  # fmt: skip


def open_bar(title: str, total: int, unit: str):
    from selm_jax.shell.progress import bar

    return bar(console, title, total, unit)
