"""What a person at the terminal sees while a stage works: bars with rates and the time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# advance(items, tokens): items of the bar's total, and tokens, whose rate is shown
Advance = Callable[[int, int], None]


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """The terminal, which shows every text as it is.

    Paths, model names and prompts have brackets and colons in them: rich would take `[/data]` for the
    end of a style, and `:smile:` for a picture.
    """
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)


@contextlib.contextmanager
def bar(console: Console, title: str, total: int, unit: str) -> Iterator[Advance]:
    """A progress bar over `total` items; where there is no terminal it shows nothing."""
    if not console.is_terminal:
        yield lambda items, tokens=0: None
        return
    columns = (
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        _TokenRate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, tokens=0)

        def advance(items: int, tokens: int = 0) -> None:
            before = progress.tasks[0].fields["tokens"]
            progress.update(task, advance=items, tokens=before + tokens)

        yield advance


class _TokenRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.elapsed or not task.fields["tokens"]:
            return Text("")
        return Text(f"{task.fields['tokens'] / task.elapsed:,.0f} tokens/s", style="cyan")
