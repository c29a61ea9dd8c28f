"""Compares this package with the authors' recipe, TRL, transformers and Tunix.

    python benchmarks/versus_torch.py --torch-python VENV/bin/python --tunix-python VENV/bin/python

All use the same weights, token ids and batches, in float32. Each contestant is a separate process;
the processes of a comparison run at the same time and take turns, step by step, so that a slow
minute of the machine affects all of them. Ratios are ratios of medians over the same rounds.
benchmarks/README.md says how to make the two environments; contestants without one are left out,
and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PATIENCE = 900  # seconds to wait for a contestant's answer


@dataclass(frozen=True)
class Contestant:
    key: str
    title: str
    environment: str  # which Python runs it: ours, torch, tunix
    script: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Contestants whose steps take turns; their speed is counted in `unit` per second."""

    title: str
    unit: str
    contestants: tuple[str, ...]


ALL = {
    c.key: c
    for c in (
        Contestant(
            "selm", "SELM update, three distinct responses", "ours", "selm_train", ("distinct",)
        ),
        Contestant("selm_shared", "SELM update, shared roles", "ours", "selm_train", ("shared",)),
        Contestant("selm_dpo", "our update, DPO on pairs", "ours", "selm_train", ("dpo",)),
        Contestant("authors", "the authors' recipe, torch", "torch", "authors_train"),
        Contestant(
            "trl_cached", "TRL DPO, reference precomputed", "torch", "trl_train", ("cached",)
        ),
        Contestant("trl_live", "TRL DPO, reference live", "torch", "trl_train", ("live",)),
        Contestant("tunix_live", "Tunix DPO, reference live", "tunix", "tunix_train", ("live",)),
        Contestant("tunix_none", "Tunix DPO, no reference", "tunix", "tunix_train", ("none",)),
        Contestant("engine", "our engine", "ours", "selm_generate"),
        Contestant("transformers", "transformers generate", "torch", "transformers_generate"),
        Contestant("tunix_sampler", "Tunix Sampler", "tunix", "tunix_generate"),
    )
}  # fmt: skip

COMPARISONS = (
    Comparison("SELM", "examples", ("selm", "selm_shared", "authors")),
    Comparison("DPO", "examples", ("selm", "selm_dpo", "trl_cached", "trl_live")),
    Comparison("Tunix", "examples", ("selm_dpo", "tunix_none", "tunix_live")),
    Comparison("generation", "tokens", ("engine", "transformers", "tunix_sampler")),
)


@dataclass(frozen=True)
class Bar:
    """A goal: the ratio of `ours` to `theirs` is at least (for memory: at most) `wanted`."""

    title: str
    comparison: str
    quantity: str  # speed or memory
    ours: str
    theirs: str
    wanted: float


BARS = (
    Bar(
        "examples/s, three distinct responses, against the authors' recipe", "SELM", "speed",
        "selm", "authors", 2.0,
    ),
    Bar(
        "examples/s, shared roles, against the authors' recipe", "SELM", "speed",
        "selm_shared", "authors", 2.5,
    ),
    Bar(
        "SELM on 4 examples against TRL DPO on 4 pairs, cached reference", "DPO", "speed",
        "selm", "trl_cached", 1.0,
    ),
    Bar("peak memory against the authors' recipe", "SELM", "memory", "selm", "authors", 0.6),
    Bar(
        "peak memory against TRL DPO, cached reference", "DPO", "memory", "selm", "trl_cached", 0.6
    ),
    Bar("peak memory against TRL DPO, live reference", "DPO", "memory", "selm", "trl_live", 0.6),
    Bar(
        "tokens/s against transformers generate", "generation", "speed",
        "engine", "transformers", 1.7,
    ),
    Bar("tokens/s against Tunix Sampler", "generation", "speed", "engine", "tunix_sampler", 1.0),
)  # fmt: skip


class Process:
    """The running process of a contestant."""

    def __init__(self, contestant: Contestant, python: str, model: Path, data: Path, logs: Path):
        self.contestant = contestant
        self.log = logs / f"{contestant.key}.log"
        command = [python, str(HERE / "contestants" / f"{contestant.script}.py"), str(model)]
        # Torch's spinning threads would take the other contestants' cores between its steps.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        if contestant.environment == "ours":
            paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, str(data), *contestant.arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment,
            )  # fmt: skip
        self.lines: Queue[str] = Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.about = self._answer()

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _answer(self) -> dict:
        try:
            line = self.lines.get(timeout=PATIENCE)
        except Empty:
            line = ""
        if not line:
            self.process.kill()
            tail = self.log.read_text(errors="replace")[-2000:]
            sys.exit(
                f"{self.contestant.title} stopped or did not answer. The end of its log:\n{tail}"
            )
        return json.loads(line)


@dataclass
class Measured:
    """Results of a contestant in a comparison: its versions, and its steps after the warm-up."""

    about: dict
    steps: list[dict] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [s["seconds"] for s in self.steps]

    @property
    def scoring(self) -> list[float]:
        return [s["score_seconds"] for s in self.steps if "score_seconds" in s]

    @property
    def gflops(self) -> list[float]:
        return [rate for s in self.steps for rate in s["gflops"]]

    @property
    def peak(self) -> float:
        return max(s["peak_mib"] for s in self.steps)


def compare(
    comparison: Comparison, pythons: dict[str, str], model: Path, data: Path, folder: Path, a
) -> dict[str, Measured]:
    """Runs one comparison: starts and warms up all contestants, then runs the rounds."""
    folder = folder / comparison.title
    folder.mkdir()
    processes: dict[str, Process] = {}
    try:
        for key in comparison.contestants:
            if ALL[key].environment in pythons:
                began = time.perf_counter()
                python = pythons[ALL[key].environment]
                processes[key] = Process(ALL[key], python, model, data, folder)
                ready = time.perf_counter() - began
                warm = [processes[key].step() for _ in range(a.warmup)]
                line = f"ready in {ready:.0f} s, warm-up {[round(s['seconds'], 2) for s in warm]}"
                say(f"{comparison.title}: {ALL[key].title}: {line}")
        found = {key: Measured(process.about) for key, process in processes.items()}
        for turn in range(a.rounds):
            for key, process in processes.items():
                step = process.step()
                found[key].steps.append(step)
                check_tokens(ALL[key], step, a)
            line = ", ".join(f"{key} {m.seconds[-1]:.2f} s" for key, m in found.items())
            say(f"{comparison.title}: round {turn + 1} of {a.rounds}: {line}")
        return found
    finally:
        for process in processes.values():
            process.close()


def check_tokens(contestant: Contestant, step: dict, a) -> None:
    """Checks that a contestant generated the expected number of tokens."""
    expected = a.prompts * a.response
    if step.get("tokens", expected) != expected:
        sys.exit(f"{contestant.title} generated {step['tokens']} tokens; expected {expected}")


def make_data(model: Path, a) -> dict:
    """Makes the data for all contestants, from words of one token, so that texts match the ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    words = {}
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        text = " " + token[1:]
        word = token[0] == "\u0120" and len(token) > 3 and token[1:].isascii()
        if (
            word
            and token[1:].isalpha()
            and token[1:].islower()
            and tokenizer.encode(text, add_special_tokens=False).ids == [i]
        ):
            words[i] = text
    eos = json.loads((model / "config.json").read_text())["eos_token_id"]
    eos = eos[0] if isinstance(eos, list) else eos
    rng = random.Random(a.seed)

    def draw(count):
        ids = rng.choices(list(words), k=count)
        return ids, "".join(words[i] for i in ids)

    def row():
        prompt, prompt_text = draw(a.prompt)
        responses = [draw(a.response - 1) for _ in range(3)]
        return {
            "prompt": prompt, "prompt_text": prompt_text,
            "responses": [[*ids, eos] for ids, _ in responses],
            "texts": [text for _, text in responses],
        }  # fmt: skip

    def question():
        ids, text = draw(a.prompt - 1)
        return {"ids": [eos, *ids], "text": text}

    return {
        "settings": {
            "prompt": a.prompt, "response": a.response, "beta": 0.01, "alpha": 0.001,
            "learning_rate": 1e-6,
        },
        "train": [[row() for _ in range(a.examples)] for _ in range(a.warmup + a.rounds)],
        "generate": [question() for _ in range(a.prompts)],
    }  # fmt: skip


def loss_difference(found: dict[str, Measured]) -> float | None:
    """The largest difference between our losses and those of the authors' recipe."""
    if "authors" not in found:
        return None
    both = zip(found["selm"].steps, found["authors"].steps, strict=True)
    return max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in both)


@dataclass(frozen=True)
class Verdict:
    bar: Bar
    ratio: float | None  # None: a contestant was left out
    spread: tuple[float, float] | None = None  # over rounds

    @property
    def text(self) -> str:
        if self.ratio is None:
            return "left out"
        met = self.ratio >= self.bar.wanted
        if self.bar.quantity == "memory":
            met = self.ratio <= self.bar.wanted
        return "met" if met else "NOT MET"


def judge(bar: Bar, results: dict[str, dict[str, Measured]]) -> Verdict:
    found = results[bar.comparison]
    if bar.ours not in found or bar.theirs not in found:
        return Verdict(bar, None)
    ours, theirs = found[bar.ours], found[bar.theirs]
    if bar.quantity == "memory":
        return Verdict(bar, ours.peak / theirs.peak)
    rounds = [t / o for o, t in zip(ours.seconds, theirs.seconds, strict=True)]
    ratio = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
    return Verdict(bar, ratio, (min(rounds), max(rounds)))


def spread(values: list[float], digits: int = 2) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def rows(results: dict[str, dict[str, Measured]], a) -> list[list[str]]:
    out = []
    for comparison in COMPARISONS:
        for key in comparison.contestants if comparison.title in results else ():
            m = results[comparison.title].get(key)
            head = [comparison.title, ALL[key].title]
            if m is None:
                out.append([*head, "left out", "", "", "", ""])
                continue
            per_step = a.examples if comparison.unit == "examples" else a.prompts * a.response
            rate = per_step / statistics.median(m.seconds)
            digits = 3 if comparison.unit == "examples" else 0
            speed = f"{rate:.{digits}f} {comparison.unit}/s"
            out.append(
                [
                    *head, spread(m.seconds), speed,
                    spread(m.scoring) if m.scoring else "",
                    f"{m.peak:.0f}", spread(m.gflops, 0),
                ]
            )  # fmt: skip
    return out


HEADS = (
    "comparison", "contestant", "s/step, median (min-max)", "speed at the median",
    "scoring the reference, s", "peak RSS, MiB", "matmul around steps, GFLOP/s",
)  # fmt: skip
BAR_HEADS = ("bar", "wanted", "measured", "per round", "verdict")


def bar_rows(verdicts: list[Verdict]) -> list[list[str]]:
    out = []
    for v in verdicts:
        sign = "at most" if v.bar.quantity == "memory" else "at least"
        measured = "" if v.ratio is None else f"{v.ratio:.2f}"
        per_round = "" if v.spread is None else f"{v.spread[0]:.2f}-{v.spread[1]:.2f}"
        out.append([v.bar.title, f"{sign} {v.bar.wanted:g}", measured, per_round, v.text])
    return out


def markdown(heads, body) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def show(title: str, heads, body) -> None:
    table = Table(*heads, title=title)
    for row in body:
        table.add_row(*row)
    Console(width=max(160, Console().width)).print(table)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def notes(results, worst: float | None, a) -> list[str]:
    versions = {}
    for found in results.values():
        for m in found.values():
            versions |= m.about["versions"]
    work = (
        f"{a.examples} examples or pairs a step, prompts of {a.prompt} tokens, responses of "
        f"{a.response}, nothing padded; {a.prompts} prompts of {a.prompt} tokens and {a.response} "
        "sampled tokens each (temperature 1, no filters, no end). float32. "
        f"{a.warmup} steps of warm-up, {a.rounds} rounds."
    )
    machine = (
        f"Machine: {os.cpu_count()} CPUs, {cpu_name()}. Python {platform.python_version()}. "
        + ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
        + "."
    )
    scoring = (
        "Our steps and those of TRL with a precomputed reference read stored log-probabilities. "
        "Computing them takes one forward pass over each example, once per iteration, which is not "
        "part of the step: it is measured separately as scoring."
    )
    out = [work, machine, scoring]
    if worst is not None:
        found = results["SELM"]
        whole = statistics.median(
            map(sum, zip(found["selm"].seconds, found["selm"].scoring, strict=True))
        )
        ratio = statistics.median(found["authors"].seconds) / whole
        out.append(
            f"Including scoring, SELM with three distinct responses is {ratio:.2f} times as fast "
            f"as the authors' recipe. Their losses differ by at most {worst:.1e} in any round."
        )
    return out


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((x.split(": ")[1] for x in text.splitlines() if x.startswith("model name")), "?")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--torch-python", help="Python executable with torch, transformers and trl")
    add("--tunix-python", help="Python executable with google-tunix")
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="model folder or Hub id")
    add("--rounds", type=int, default=7)
    add("--warmup", type=int, default=2, help="steps of each contestant before the rounds")
    add("--examples", type=int, default=4, help="examples per training step")
    add("--prompts", type=int, default=16, help="prompts per generation step")
    add("--prompt", type=int, default=64, help="tokens of a prompt")
    add("--response", type=int, default=64, help="tokens of a response")
    add("--seed", type=int, default=0)
    add("--only", action="append", choices=[c.title for c in COMPARISONS])
    add("--json", type=Path, help="file for all measurements")
    add("--markdown", type=Path, help="file for the tables")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    from selm_jax.weights import sources

    model = sources.resolve(a.model).path
    pythons = {"ours": sys.executable, "torch": a.torch_python, "tunix": a.tunix_python}
    pythons = {name: python for name, python in pythons.items() if python}
    results: dict[str, dict[str, Measured]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data.json"
        data.write_text(json.dumps(make_data(model, a)))
        for comparison in COMPARISONS:
            if a.only is None or comparison.title in a.only:
                results[comparison.title] = compare(
                    comparison, pythons, model, data, Path(scratch), a
                )
    worst = loss_difference(results.get("SELM", {}))
    verdicts = [judge(bar, results) for bar in BARS if bar.comparison in results]
    body, bars, remarks = rows(results, a), bar_rows(verdicts), notes(results, worst, a)
    show("Measurements", HEADS, body)
    show("Goals", BAR_HEADS, bars)
    print("\n".join(remarks))
    if a.json:
        a.json.write_text(
            json.dumps(
                {
                    "settings": {k: str(v) for k, v in vars(a).items()},
                    "notes": remarks,
                    "results": {
                        title: {k: {"about": m.about, "steps": m.steps} for k, m in found.items()}
                        for title, found in results.items()
                    },
                    "bars": [dict(zip(BAR_HEADS, row, strict=True)) for row in bars],
                },
                indent=1,
            )
        )
    if a.markdown:
        listed = "\n".join(f"- {remark}" for remark in remarks)
        parts = [markdown(HEADS, body), markdown(BAR_HEADS, bars), listed]
        a.markdown.write_text("\n\n".join(parts) + "\n")
    if worst is not None and worst > 1e-3:
        sys.exit("SELM and the authors' recipe computed different losses: ignore these results")


if __name__ == "__main__":
    main()
