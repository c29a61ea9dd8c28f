"""Writes a run's results in words: the summary paragraph, warnings, and comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from selm_jax.report.data import RunData
from selm_jax.report.texts import TextMeasures, measure
from selm_jax.statistics.intervals import Estimate, difference
from selm_jax.statistics.proportions import counted


def number(value: float | None, sign: bool = False) -> str:
    """Formats a number: two decimals, fewer for 10 and above, more below 0.1."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size < 1e-12:  # a rounding error, such as that of 0.3 - 0.1 - 0.1 - 0.1
        return "0"
    if size < 1e-4:
        text = f"{size:.1e}".replace("e-0", "e-").replace("e-", "e−")
    elif size < 0.095:
        text = f"{size:.{1 - math.floor(math.log10(size))}f}".rstrip("0")
    elif size < 9.995:
        text = f"{size:.2f}"
    elif size < 99.95:
        text = f"{size:.1f}".removesuffix(".0")
    else:
        text = f"{size:,.0f}"
    return ("−" if value < 0 else "+" if sign and value > 0 else "") + text


def p_value(p: float | None) -> str:
    """A p value for readers; below 1e-12, only that it is below."""
    return "< 1e−12" if p is not None and p < 1e-12 else number(p)


def percent(share: float | None) -> str:
    """Formats a share as a percentage: a whole number, or one significant digit below 1 %."""
    if share is None or not math.isfinite(share):
        return "–"
    text = f"{100 * share:.0f}" if share == 0 or share >= 0.0095 else f"{100 * share:.1g}"
    return f"{text}\N{NO-BREAK SPACE}%"


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names in a sentence: "a", "a and b", "a, b and c", with `last` before the last one."""
    return f" {last} ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def evaluated(run: RunData) -> list[int]:
    """The iterations that have a reward of greedy held-out answers."""
    return [k for k in run.evaluations if run.metric(k, "reward_greedy") is not None]


def measured(run: RunData, kind: str) -> dict[int, TextMeasures]:
    """Text statistics of a run's answers of one kind (greedy or sample), by iteration."""
    groups: dict[int, list] = {}
    for answer in run.answers:
        if answer.kind == kind:
            groups.setdefault(answer.iteration, []).append(answer)
    return {k: measure(answers) for k, answers in sorted(groups.items())}


def progress(run: RunData) -> str:
    """Describes a run's progress, such as "finished, 3 iterations" or "unfinished, 1 of 3 ..."."""
    last = "evaluate" if run.evaluates else "export"
    done = len([k for k, stages in run.stages.items() if k > 0 and last in stages])
    if not run.unfinished:
        return f"finished, {plural(done, 'iteration')}"
    return f"unfinished, {done} of {run.planned or 'an unknown number of'} iterations complete"


def paragraph(run: RunData) -> str:
    """Writes in one or two sentences how the held-out reward changed during the run."""
    known = evaluated(run)
    if any(run.metric(k, "accuracy") is not None for k in run.evaluations):
        return _accuracy(run)
    if not run.evaluates:
        return (
            "The settings name no held-out prompts (data.heldout), so nothing can be said about "
            "the reward. The rest of this page is only about training and ranking."
        )
    if any(run.metric(k, "unread") for k in run.evaluations) and not known:
        return (
            "The judge's replies about the held-out answers could not be read, so nothing can be "
            "said about the reward."
        )
    if run.evaluations and not known:
        return (
            "Human annotators compare answers without scores, so nothing can be said about a "
            "held-out reward. The KL from the start model is below, and so are the answers."
        )
    if not known:
        return "No held-out evaluation is finished yet, so nothing can be said about the reward."
    last = known[-1]
    end = run.metric(last, "reward_greedy")
    if last == 0 or 0 not in known:
        who = "the start model" if last == 0 else f"iteration {last}"
        lack = "No trained iteration" if last == 0 else "The start model"
        return (
            f"Held-out reward of {who}: {number(end)}. {lack} has been evaluated, "
            "so there is no change to report yet."
        )
    start = run.metric(0, "reward_greedy")
    gain, low, high = (run.metric(last, f"gain{end}") for end in ("", "_low", "_high"))
    # If the interval contains 0, nothing can be said about a rise or a fall.
    clear = low is not None and high is not None and (low > 0 or high < 0)
    verb = ("rose" if (gain or 0) > 0 else "fell") if clear else "did not change clearly:"
    text = f"Held-out reward {verb} from {number(start)} to {number(end)}"
    if gain is not None and low is not None and high is not None:
        prompts = run.metric(last, "prompts")
        among = f", {prompts:.0f} prompts" if prompts is not None else ""
        text += (
            f" (paired difference {number(gain, sign=True)}, "
            f"95\u00a0% interval {number(low)} to {number(high)}{among})"
        )
    kl = run.metric(last, "kl")
    if kl is not None:
        text += f", at a KL of {number(kl)} nats per answer from the start"
    text += f", after {plural(last, 'iteration')}."
    best = max(known, key=lambda k: run.metric(k, "reward_greedy") or -math.inf)
    if number(run.metric(best, "reward_greedy")) != number(end):
        text += (
            f" The highest reward, {number(run.metric(best, 'reward_greedy'))}, "
            f"belongs to {'the start model' if best == 0 else f'iteration {best}'}."
        )
    return text


def _accuracy(run: RunData) -> str:
    """Writes a reward model's accuracy on the held-out pairs in a sentence."""
    last = max(k for k in run.evaluations if run.metric(k, "accuracy") is not None)
    share, low, high = (run.metric(last, f"accuracy{end}") for end in ("", "_low", "_high"))
    text = (
        f"After {plural(last, 'iteration')}, this reward model gives the chosen answer the higher "
        f"reward in {percent(share)} of {number(run.metric(last, 'pairs'))} held-out pairs "
        f"(95\u00a0% interval {percent(low)} to {percent(high)})"
    )
    start = run.metric(0, "accuracy")
    return text + (f", at the start in {percent(start)}." if last and start is not None else ".")


def alarms(run: RunData) -> list[str]:
    """Warns of signs that answers became worse while the reward rose, and of other problems.

    The thresholds are rules of thumb that choose what to point out.
    """
    found = []
    greedy = measured(run, "greedy")
    if len(greedy) > 1 and 0 in greedy:
        last = max(greedy)
        a, b = greedy[0], greedy[last]
        if b.distinct_2 < 0.8 * a.distinct_2:
            found.append(
                f"Answers repeat themselves more: distinct-2 fell from {number(a.distinct_2)} "
                f"to {number(b.distinct_2)}."
            )
        if b.different < a.different - 0.1:
            found.append(
                "More prompts get the same answer: the share of different texts fell from "
                f"{percent(a.different)} to {percent(b.different)}."
            )
        if b.cut_off > a.cut_off + 0.1:
            found.append(
                f"More answers reach the length limit: {percent(a.cut_off)} at the start, "
                f"{percent(b.cut_off)} now."
            )
        if b.words > 1.5 * a.words or 1.5 * b.words < a.words:
            found.append(
                f"The mean length changed a lot, from {number(a.words)} to {number(b.words)} "
                "words. Some rankers prefer long answers."
            )
    for k, stages in run.stages.items():
        if "rank" not in stages:
            continue
        dropped = sum(stages["rank"].drops.values())
        total = dropped + stages["rank"].counts.get("pairs", 0)
        if total and dropped / total > 0.25:
            found.append(
                f"Iteration {k} dropped {percent(dropped / total)} of its prompts when ranking."
            )
    return found


def paired_difference(one: RunData, other: RunData) -> Estimate | None:
    """Estimates the mean score of `other` minus that of `one`, from the last greedy answers.

    This is like a run's gain, but between two runs; the interval covers the choice of prompts. The
    result is None if no prompt has a score in both runs.
    """
    first, second = _last_scores(one), _last_scores(other)
    shared = [prompt for prompt in second if prompt in first]
    scores = (np.array([[of[prompt] for prompt in shared]]) for of in (second, first))
    return difference(*scores, share=counted([*first.values(), *second.values()]))


def settings_differences(
    tables: Sequence[Mapping[str, str]],
) -> list[tuple[str, list[str | None]]]:
    """The settings whose values differ between runs, as (key, value of each run)."""
    keys = list(dict.fromkeys(key for table in tables for key in table))
    rows = [(key, [table.get(key) for table in tables]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def rankers_of(runs: Sequence[RunData]) -> set[tuple[tuple[str, str], ...]]:
    """The distinct rankers that scored the runs' answers, each as a tuple of its settings."""
    return {
        tuple(
            (k, v)
            for k, v in run.settings.items()
            if k.startswith(("feedback.ranker", "feedback.settings"))
        )
        for run in runs
    }


def _last_scores(run: RunData) -> dict[tuple[str, str], float]:
    greedy = [answer for answer in run.answers if answer.kind == "greedy"]
    last = max((answer.iteration for answer in greedy), default=0)
    return {(a.prompt_id, a.prompt): a.score for a in greedy if a.iteration == last}
