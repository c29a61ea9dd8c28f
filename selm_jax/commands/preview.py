"""`selm preview`: shows the rows that a run will train on, and problems that would stop it.

It shows the first rows of an iteration as decoded tokens, coloured by role, and counts over all
rows what goes wrong silently elsewhere: BOS and end tokens, and texts that are cut, dropped, tied
or too long. It builds the loss and the ranker and checks every row, as `selm run` does. If the run
folder has the iteration's pairs or examples, and they belong to the present data, those are shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selm_jax.commands.ending import is_for_the_user
from selm_jax.commands.preview_rows import CUT, Alone, Preview, collect, labels
from selm_jax.config import fixed_length
from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.batches import updates_per_epoch
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import row_lengths
from selm_jax.preferences.packing import assign_rows
from selm_jax.run.check import check_objective, check_rows, check_tasks, told_of_data
from selm_jax.run.rows import RunError, prompt_ids
from selm_jax.run.run import Run
from selm_jax.shell.mirror import in_words
from selm_jax.shell.user_code import is_user_code
from selm_jax.text.answers import answers
from selm_jax.text.chat import Chat
from selm_jax.training.loop import TrainingPlan

STYLES = {"prompt": "blue", "scored": "green", "padding": "bright_black"}
LETTERS = {"prompt": "p", "scored": "s", "padding": "."}  # where there are no colours


def preview(run: Run, t: int, count: int) -> bool:
    """Prints the first `count` rows of iteration t, then counts and lengths over all rows.

    Returns:
      whether `selm run` would start with these settings, this data and this run folder.

    Raises:
      RunError: there is no such iteration, or a prompt cannot be rendered.
      ChatError: an answer of the data cannot be used, and `data.on_bad_row` does not drop it.
    """
    last = run.experiment.portions - run.experiment.data.first_portion + 1
    if not 1 <= t <= last:
        raise RunError(
            f"there is no iteration {t}: data.portions gives iterations 1 to {last}. Give one of "
            "these with --iteration"
        )
    console, found = run.console, collect(run, t)
    e = run.experiment
    console.print(
        f"iteration {t}, layout {e.text.layout}: {in_words(found.source)}", soft_wrap=True
    )
    if not run.imports and is_user_code(e.objective["loss"]):
        console.print(
            "objective.loss is your own function, and previews of a run folder do not import your "
            f"code: the rows are shown as for {run.task.trains}. To import the function, give the "
            "experiment file",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    for line in told_of_data(run.data):
        console.print(line, style="yellow", soft_wrap=True)
    for change in found.changed:
        console.print(f"made with other settings: {change}", style="yellow", soft_wrap=True)
    if _has_colour(console):
        console.print(Text("  ").join(Text(role, style) for role, style in STYLES.items()), "\n")
    for number, row in enumerate(found.rows[:count], start=1):
        console.print(drawn(row, number, run.chat, console), soft_wrap=True, end="\n\n")
    examples = [row for row in found.rows if isinstance(row, Example)]
    problem = found.stale or _problem(run)
    sizes = None if problem else run.sizes
    if examples:
        rows = run.experiment.training.rows if sizes is None else sizes.sizes.rows
        _print_packing(run, t, examples, count, 1 if rows == "auto" else rows)
    console.print(_counts(run, t, found), end="\n\n")
    console.print(_histogram(found.rows, console.width, "#" if console.options.ascii_only else "█"))
    if sizes is not None and sizes.line:
        console.print(f"on this machine, {sizes.line}", soft_wrap=True, highlight=False)
    if problem:
        console.print(in_words(f"selm run will stop here: {problem}"), style="red", soft_wrap=True)
    return problem is None


def _problem(run: Run) -> str | None:
    """The reason why `selm run` would refuse the settings or data; None if there is none."""
    try:
        if run.imports or not is_user_code(run.experiment.objective["loss"]):
            check_objective(run)
        check_rows(run)
        if run.imports:  # task files may name code
            check_tasks(run)
    except Exception as error:
        if not is_for_the_user(error):
            raise
        return str(error)
    return None


# --- what is printed ---------------------------------------------------------------------------


def drawn(row: Example | Alone, number: int, chat: Chat, console: Console) -> Text:
    """Formats a row for the terminal: every token, even special ones, marked by its role."""
    whole = Text(f"{number}  {row.prompt_id}", style="bold")
    before = _decoded(chat, row.prompt)
    parts = [("prompt", "prompt", row.prompt, before)]
    for label, ids in zip(labels(row), row.responses, strict=True):
        # Decoded behind the prompt: alone, some tokenizers would lose its first space.
        both = _decoded(chat, (*row.prompt, *ids))
        text = both[len(before) :] if both.startswith(before) else _decoded(chat, ids)
        parts.append((label, "scored", ids, text))
    for label, role, ids, text in parts:
        unit = "token" if len(ids) == 1 else "tokens"
        whole.append(f"\n{label}, {len(ids):,} {unit}: ", style="not bold italic")
        whole.append_text(_piece(text, role, chat, console))
    return whole


def _decoded(chat: Chat, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode(ids)


def _piece(text: str, role: str, chat: Chat, console: Console) -> Text:
    line_break = r"\n" if console.options.ascii_only else "⏎"
    text = text.replace("\n", f"{line_break}\n")
    if not _has_colour(console):
        return Text(f"[{role}]{text}[/{role}]")
    piece = Text(text, style=f"not bold {STYLES[role]}")
    piece.highlight_words(chat.tokenizer.all_special_tokens, "reverse")
    piece.highlight_words([line_break], "dim")
    return piece


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _print_packing(run: Run, t: int, examples: Sequence[Example], count: int, size: int) -> None:
    """Prints how the first update's examples are packed: `ppssss..`, or bars in colour.

    Args:
      size: the number of rows of a batch.
    """
    settings, console = run.experiment.training, run.console
    fitting = [e for e in examples if e.tokens <= (fixed_length(settings.row_length) or math.inf)]
    updates, whole = 0, ""
    if updates_per_epoch(len(fitting), settings.global_batch):
        # The devices here need not be those of the run, which may share fewer rows.
        plan = TrainingPlan.make(settings, fitting, run.experiment.seed, t, rows=size, ways=size)
        fitting, counts = plan.updates[0], plan.counts()
        updates, length = counts["updates"], plan.shape.time
        used = counts["tokens_useful"] / counts["tokens_padded"]
        whole = f"; {used:.0%} of the iteration's batches of {size} rows are not padding"
    else:
        longest = max((e.tokens for e in fitting), default=1)
        length = fixed_length(settings.row_length) or row_lengths(longest)[0]
    rows = assign_rows(fitting, length)
    used = sum(e.tokens for e in fitting) / max(len(rows) * length, 1)
    console.print(
        f"{f'update 1 of {updates}' if updates else 'less than one update'}: {len(fitting):,} "
        f"examples in {len(rows):,} rows of {length:,} tokens, {used:.0%} of them used{whole}"
        + ("" if _has_colour(console) else " (p: prompt, s: scored, .: padding)"),
        soft_wrap=True,
        highlight=False,
    )
    for row in rows[:count]:
        roles = [
            role
            for i in row
            for role, length in (("prompt", len(fitting[i].prompt)), ("scored", fitting[i].scored))
            for _ in range(length)
        ]
        console.print(_bar(roles, length, console))
    console.print()


def _bar(roles: Sequence[str], length: int, console: Console) -> Text:
    """Draws a packed row as a bar of equal cells, each with the role of its middle token."""
    cells = min(console.width, length)
    middles = [int((cell + 0.5) * length / cells) for cell in range(cells)]
    each = [roles[token] if token < len(roles) else "padding" for token in middles]
    if not _has_colour(console):
        return Text("".join(LETTERS[role] for role in each))
    return Text.assemble(*(("█" * len(list(run)), STYLES[role]) for role, run in groupby(each)))


def _counts(run: Run, t: int, found: Preview) -> Table:
    """A table of counts over all rows, which reveals problems before training."""
    e, chat = run.experiment, run.chat
    bos, stops = chat.tokenizer.bos_token_id, set(chat.stop_ids)
    responses = [ids for row in found.rows for ids in row.responses]
    lengths = [len(row.prompt) for row in found.rows]
    if e.text.layout == "paper":  # whose prompts are not those that are answered
        lengths = [len(prompt_ids(run.chat, prompt)) for prompt in run.prompts(t)]
    examples = [row for row in found.rows if isinstance(row, Example)]
    row = fixed_length(e.training.row_length)

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("rows", f"{len(found.rows):,}")
    if bos is None:
        table.add_row("BOS", "the tokenizer has none")
    else:
        name = chat.tokenizer.bos_token
        front = [_leading(row.prompt, bos) for row in found.rows]
        table.add_row(f"{name} in front", _spread(front, "rows"))
        inside = [row.prompt.count(bos) - n for row, n in zip(found.rows, front, strict=True)]
        table.add_row(f"{name} further on in a prompt", _spread(inside, "rows"))
        if responses:
            table.add_row(
                f"{name} in a response", _spread((ids.count(bos) for ids in responses), "responses")
            )
    if responses:
        ends = Counter(sum(token in stops for token in ids) for ids in responses)
        spread = _spread(ends.elements(), "responses")
        table.add_row(
            f"end tokens ({', '.join(chat.tokenizer.convert_ids_to_tokens(sorted(stops)))})",
            spread + (" (0: cut off)" if ends[0] else ""),
        )
    table.add_row("control tokens that texts spell", Text(_spelled(run, t)))
    for key in CUT if e.text.layout == "paper" else ():
        table.add_row(key.replace("_", " "), f"{found.cut.get(key, 0):,}")
    table.add_row("dropped", _listed(found.dropped))
    table.add_row("bad rows of the data", _listed(_bad_rows(run)))
    table.add_row("tied", "not ranked yet" if found.tied is None else f"{found.tied:,}")
    if examples and row is not None:
        long = sum(example.tokens > row for example in examples)
        table.add_row("longer than training.row_length", f"{long:,}")
    over = sum(length > e.rollout.max_prompt_tokens for length in lengths)
    table.add_row("prompts longer than rollout.max_prompt_tokens", f"{over:,}")
    return table


def _spelled(run: Run, t: int) -> str:
    """Counts special tokens that are spelled out in prompts, as a text for the preview."""
    e, every = run.experiment, run.prompts(t)
    counts, prompts = Counter[str](), 0
    for prompt in every:
        texts = [m.content for m in prompt.messages]
        texts += answers(prompt).values() if e.candidates.dataset else ()
        found = [token for text in texts for token in run.chat.spelled.find(text)]
        counts.update(found)
        prompts += bool(found)
    if not counts:
        return "0"
    how = e.text.special_tokens.replace("_", " ")
    where = f"{counts.total():,} in {prompts:,} of {len(every):,} prompts, {how}"
    return f"{where}: {_listed({token: n for token, n in counts.most_common()})}"


def _bad_rows(run: Run) -> dict[str, int]:
    """Counts the rows of the whole data set that cannot be used, by reason."""
    return {reason: len(numbers) for reason, numbers in run.data.all_prompts.dropped.items()}


def _leading(ids: Sequence[int], token: int) -> int:
    return next((i for i, each in enumerate(ids) if each != token), len(ids))


def _spread(numbers: Iterable[int], unit: str) -> str:
    """Lists how often each number occurs, such as `1 in 380 rows, 2 in 4 rows`."""
    found = sorted(Counter(numbers).items())
    return ", ".join(f"{n} in {count:,} {unit}" for n, count in found)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "0"


def _histogram(rows: Sequence[Example | Alone], width: int, block: str) -> Table:
    """A histogram of the lengths, in tokens, of prompts and of each role's responses."""
    lengths = {"prompt": [len(row.prompt) for row in rows]}
    for role in ROLES:
        of_role = [
            len(row.responses[i]) for row in rows if role in row.roles for i in row.playing(role)
        ]
        if of_role:
            lengths[role] = of_role
    longest = max(map(max, lengths.values()), default=0) if rows else 0
    step = next(s for k in range(9) for s in (10**k, 2 * 10**k, 5 * 10**k) if longest < 12 * s)
    bar = max((width - 14) // len(lengths) - 9, 4)
    table = Table(box=None, pad_edge=False, title=None)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in lengths:
        table.add_column(name, no_wrap=True)
    counts = {
        name: np.bincount(np.asarray(each, int) // step, minlength=longest // step + 1)
        for name, each in lengths.items()
    }
    for i in range(longest // step + 1):
        cells = [
            f"{each[i]:>6,} {block * round(bar * each[i] / max(each.max(), 1))}"
            for each in counts.values()
        ]
        table.add_row(f"{i * step:,}-{(i + 1) * step - 1:,}", *cells)
    for name, of in (("median", np.median), ("longest", max)):
        table.add_row(name, *(f"{of(each):>6,.0f}" if each else "" for each in lengths.values()))
    return table
