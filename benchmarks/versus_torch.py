"""Compares this package with the authors' recipe, TRL, transformers and Tunix.

    python benchmarks/versus_torch.py --torch-python VENV/bin/python --tunix-python VENV/bin/python

All use the same weights, token ids and batches, in float32. Each contestant is a separate process;
the processes of a comparison run at the same time and take turns, step by step, so that a slow
minute of the machine affects all of them. Ratios are ratios of medians over the same rounds.
benchmarks/README.md says how to make the two environments; contestants without one are left out,
and the table says so. `--lengths realistic` trains on answers of 100 to 1,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from versus import work
from versus.contestants import ALL, KINDS, comparisons
from versus.data import Lengths, fixed, make_data, realistic
from versus.process import compare
from versus.tables import (
    BAR_HEADS,
    HEADS,
    Result,
    bar_rows,
    judge,
    loss_difference,
    markdown,
    notes,
    rows,
    show,
)

from selm_jax.models.families import read_config
from selm_jax.weights import sources


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--torch-python", help="Python executable with torch, transformers and trl")
    add("--tunix-python", help="Python executable with google-tunix")
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="model folder or Hub id")
    add("--rounds", type=int, default=7, help="number of timed rounds")
    add("--warmup", type=int, default=2, help="steps of each contestant before the rounds")
    add("--examples", type=int, default=4, help="examples per training step")
    add("--lengths", choices=("fixed", "realistic"), default="fixed", help="of training examples")
    add("--prompts", type=int, nargs="+", default=[16, 64], help="prompts per generation step")
    add("--prompt", type=int, default=64, help="tokens of a prompt, if lengths are fixed")
    add("--response", type=int, default=64, help="tokens of a response, if lengths are fixed")
    add("--seed", type=int, default=0, help="seed of the texts")
    add("--only", action="append", choices=KINDS, help="kind of comparison to run")
    add("--without", action="append", choices=list(ALL), default=[], help="contestant to leave out")
    add("--json", type=Path, help="file for all measurements")
    add("--markdown", type=Path, help="file for the tables")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    model = sources.resolve(a.model).path
    config = read_config(Path(model))
    pythons = {"ours": sys.executable, "torch": a.torch_python, "tunix": a.tunix_python}
    pythons = {name: python for name, python in pythons.items() if python}
    lengths = (
        realistic(a.examples, a.seed)
        if a.lengths == "realistic"
        else fixed(a.prompt, a.response, a.examples)
    )
    data = make_data(
        model, lengths, steps=a.warmup + a.rounds, prompts=max(a.prompts), prompt=a.prompt,
        response=a.response, seed=a.seed,
    )  # fmt: skip
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        for comparison in comparisons(a.only, a.prompts):
            found = compare(
                comparison, pythons, model, data, Path(scratch), warmup=a.warmup, rounds=a.rounds,
                without=a.without,
            )  # fmt: skip
            # All steps have examples of the same lengths, so the first one stands for all.
            gflop = {key: work.gflop(key, config, data, comparison.prompts) for key in found}
            results.append(Result(comparison, found, gflop))
            write(results, describe(results, lengths, a), a)
    worst = max((loss_difference(r.found) or 0.0 for r in results), default=0.0)
    if worst > 1e-3:
        sys.exit("SELM and the authors' recipe computed different losses: ignore these results")


def describe(results: list[Result], lengths: list[Lengths], a: argparse.Namespace) -> str:
    """Says in words what the steps that were measured consist of."""
    prompts = [each.prompt for each in lengths]
    responses = [n for each in lengths for n in each.responses]
    training = (
        f"{a.examples} examples or pairs a step, prompts of {extent(prompts)} tokens, responses of "
        f"{extent(responses)}. "
    )
    generation = (
        f"{' or '.join(map(str, a.prompts))} prompts of {a.prompt} tokens and {a.response} sampled "
        "tokens each (temperature 1, no filters, no end). "
    )
    done = {bool(r.comparison.prompts) for r in results}
    work = training * (False in done) + generation * (True in done)
    return f"{work}float32. Steps of warm-up: {a.warmup}; rounds: {a.rounds}."


def extent(values: list[int]) -> str:
    if min(values) == max(values):
        return str(values[0])
    return f"{min(values)} to {max(values)} (mean {statistics.mean(values):.0f})"


def write(results: list[Result], described: str, a: argparse.Namespace) -> None:
    """Prints the results of the finished comparisons and writes them to the files."""
    body = [row for r in results for row in rows(r, a.examples, a.response)]
    bars = [row for r in results for row in bar_rows(r.comparison, judge(r))]
    remarks = notes(results, described)
    show("Measurements", HEADS, body)
    show("Goals", BAR_HEADS, bars)
    print("\n".join(remarks), flush=True)
    if a.json:
        result = {
            "settings": {k: str(v) for k, v in vars(a).items()},
            "notes": remarks,
            "results": {
                r.comparison.title: {
                    k: {"about": m.about, "gflop": r.gflop[k], "steps": m.steps}
                    for k, m in r.found.items()
                }
                for r in results
            },
            "bars": [dict(zip(BAR_HEADS, row, strict=True)) for row in bars],
        }
        a.json.write_text(json.dumps(result, indent=1))
    if a.markdown:
        listed = "\n".join(f"- {remark}" for remark in remarks)
        parts = [markdown(HEADS, body), markdown(BAR_HEADS, bars), listed]
        a.markdown.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
