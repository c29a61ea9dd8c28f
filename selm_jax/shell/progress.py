"""Shows progress in the terminal while a stage works: bars with rates and the time left."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from selm_jax.shell import compiling
from selm_jax.shell.pace import here
from selm_jax.shell.words import duration


@dataclasses.dataclass(frozen=True)
class Talk:
    """How much the program prints: `--quiet` leaves progress out, `--verbose` adds details."""

    quiet: bool = False
    verbose: bool = False


_talk = Talk()


def talk(how: Talk) -> None:
    """Sets how much this process prints from now on."""
    global _talk
    _talk = how


def talks() -> Talk:
    """How much this process prints, as `talk` has set it."""
    return _talk


# advance(items, tokens): items of the bar's total, and tokens, whose rate is shown
Advance = Callable[[int, int], None]


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console for the terminal that prints every text literally, without markup.

    Paths, model names and prompts contain brackets and colons: rich would read `[/data]` as the end
    of a style, and `:smile:` as a picture.
    """
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)


_WIDE = 100  # columns from which a bar shows everything


@contextlib.contextmanager
def bar(
    console: Console, title: str, total: int, unit: str, after: float | None = None
) -> Iterator[Advance]:
    """A progress bar over `total` items. It shows nothing without a terminal or with `--quiet`.

    Whenever it advances, the other processes of the run learn that this one goes on (`pace`).

    Args:
      after: seconds that the run takes after this work, if they are known.
    """
    if not console.is_terminal or _talk.quiet:
        yield lambda items, tokens=0: here.sign()
        return
    wide = console.width >= _WIDE
    columns = [
        TextColumn(f"{{task.description:<{24 if wide else 0}}}", markup=False),
        BarColumn(40 if wide else 8),
        MofNCompleteColumn(),
        *((TextColumn(unit, markup=False), _TokenRate()) if wide else ()),
        _TimeLeft(after),
    ]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, tokens=0)

        def advance(items: int, tokens: int = 0) -> None:
            here.sign()
            before = progress.tasks[0].fields["tokens"]
            progress.update(task, advance=items, tokens=before + tokens)

        yield advance


class _TokenRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.elapsed or not task.fields["tokens"]:
            return Text("")
        return Text(f"{task.fields['tokens'] / task.elapsed:,.0f} tokens/s", style="cyan")


class _TimeLeft(ProgressColumn):
    """A column with the time left for this work and the whole run, or the time spent compiling."""

    def __init__(self, after: float | None):
        super().__init__()
        self.after = after

    def render(self, task: Task) -> Text:
        if (seconds := compiling.seconds()) is not None and seconds > 0.5:
            return Text(f"compiling, {seconds:.0f} s", style="yellow")
        if task.time_remaining is None:
            return Text("")
        left = f"{duration(task.time_remaining)} left"
        if self.after is not None:
            left += f", run {duration(task.time_remaining + self.after)}"
        return Text(left, style="cyan")
