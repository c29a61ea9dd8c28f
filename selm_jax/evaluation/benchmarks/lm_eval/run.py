"""Evaluates a model on tasks for `selm eval lm_eval`: loads them, runs them, writes results."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.lm_eval import tasks as lm_eval_tasks
from selm_jax.evaluation.benchmarks.lm_eval.adapter import Counter, Harness, evaluated
from selm_jax.evaluation.benchmarks.lm_eval.tasks import load_tasks, tasks_of, version
from selm_jax.evaluation.cost import show
from selm_jax.evaluation.model import Model
from selm_jax.shell import artifacts
from selm_jax.shell.progress import bar


def run(
    model: Model,
    tasks: str,
    *,
    out: Path,
    include: Path | None = None,
    limit: int | None = None,
    chat: bool = True,
    system: str | None = None,
    seed: int = 0,
    dry_run: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Evaluates a model on tasks; writes `results.json` and `samples/TASK.jsonl` into `out`.

    Args:
      tasks: names, as `tasks_of` reads them, with commas between them.
      include: folder with further task files.
      limit: use only the first `limit` rows of each task.
      chat: apply the chat template, with shots as earlier turns; otherwise all is plain text.
      dry_run: only count tokens and write nothing.

    Raises:
      EvaluationError: a task is unknown (see `tasks_of`), its data cannot be loaded, or `out`
        exists.
    """
    if not dry_run and out.exists():
        raise EvaluationError(f"{out} already exists. Move it away, or give another --out")
    manager = lm_eval_tasks.manager(include)
    loaded = load_tasks(tasks_of(tasks.split(","), manager), manager)
    harness = Counter(model) if dry_run else Harness(model, seed, partial(bar, model.console))
    results = evaluated(
        harness, loaded, manager, limit=limit, chat=chat, system=system,
        bootstrap_iters=0 if dry_run else 1000, log_samples=not dry_run,
    )  # fmt: skip
    if not results:
        return {}
    if isinstance(harness, Counter):
        show([harness.cost], console)
        return {}
    samples = results.pop("samples")
    results["config"] |= {
        "selm_model": model.name, "selm_origin": model.folder.origin, "dtype": str(model.dtype),
    }  # fmt: skip
    results["selm"] = {
        "lm_eval": version(), "chat": chat, "shots_as_turns": chat, "limit": limit,
        "tasks": [{"task": name, "version": results["versions"].get(name),
                   "shots": results["n-shot"].get(name)} for name in results["results"]],
    }  # fmt: skip
    with artifacts.whole(out) as folder:
        _write(folder / "results.json", results)
        for name, rows in samples.items():
            file = folder / "samples" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(r, default=str) + "\n" for r in rows))
    print_results(results, console)
    console.print(f"results: {out}", soft_wrap=True)
    return results


def print_results(results: dict[str, Any], console: Console) -> None:
    selm = results["selm"]
    template = "chat template" if selm["chat"] else "no chat template"
    shots = "shots as turns" if selm["shots_as_turns"] else "shots as text"
    table = Table(title=f"lm-eval {version()}: {template}, {shots}", box=None)
    for head in ("task", "version", "shots", "rows", "metric", "value", "standard error"):
        table.add_column(head, justify="left" if head in ("task", "metric") else "right")
    for name, metrics in results["results"].items():
        rows = results["n-samples"].get(name, {}).get("effective", "")
        facts = (str(results["versions"].get(name, "")), str(results["n-shot"].get(name, "")))
        for key, value in metrics.items():
            metric, _, filter_ = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not filter_:
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_}")
            label = metric if filter_ == "none" else f"{metric}, {filter_}"
            spread = f"{stderr:.4f}" if isinstance(stderr, float) else ""
            table.add_row(name, *facts, str(rows), label, f"{value:.4f}", spread)
    console.print(table)


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")
