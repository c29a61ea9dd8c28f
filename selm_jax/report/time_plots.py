"""Plots where a run's time and memory went: stages, phases of updates, speed, padding, peaks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from selm_jax.report.curves import Plot, by_update
from selm_jax.report.data import STAGES, RunData
from selm_jax.report.plots import Part, Style, strips, swatch
from selm_jax.report.summary import number
from selm_jax.training.laps import AFTER, PHASES

_COMPILING = "The first updates of an iteration include compiling."
_MFU = (
    "Share of the devices' peak for bfloat16 that an update's useful operations reach. Padding and "
    "recomputation do not count as useful; compiling does not count as time."
)
_TFLOPS = (
    "Useful operations per second, of all devices together, without the time for compiling. No "
    "peak is known for this device and number format, so there is no MFU."
)
_PADDING = "Share of computed positions without a token. training.row_length: auto makes it small."
_DEVICE = "The most that the fullest device has held so far."
_PROCESS = "The most that the process on the host has held since this training began."
# (metric of every update, title, explanation, whether it is a share)
_OF_UPDATES = (
    ("time/seconds", "Seconds per update", _COMPILING, False),
    ("time/tokens_per_second", "Training tokens per second", _COMPILING, False),
    ("time/mfu", "Model FLOP utilisation (MFU)", _MFU, True),
    ("time/tflops", "Training TFLOP/s", _TFLOPS, False),
    ("padding", "Padding", _PADDING, True),
    ("memory/device", "Peak memory of a device, GiB", _DEVICE, False),
    ("memory/process", "Peak memory of the process, GiB", _PROCESS, False),
)


def time_plots(runs: Sequence[RunData], labels: Sequence[str]) -> list[Plot]:
    """Plots the time of stages and of the phases of updates, and what each update reports."""
    stages = [
        {k: {n: s.seconds or 0.0 for n, s in st.items()} for k, st in run.stages.items()}
        for run in runs
    ]
    found = _strips(
        stages, labels, [*STAGES, *(n for r in runs for s in r.stages.values() for n in s)],
        "Time by stage", "time", "Time of each stage.",
        "How long each stage of an iteration takes. The table gives the exact seconds.",
    )  # fmt: skip
    phases = [_phases(run) for run in runs]
    if any(phases):
        found += _strips(
            phases, labels, (*PHASES, *AFTER), "Training time by phase", "phases",
            "Time of each phase of training.",
            "What the updates of an iteration spend their time on: packing and placing data, "
            "gradients, applying them, compiling, checkpoints, and writing metrics.",
        )  # fmt: skip
    # Runs of earlier versions have neither number.
    last = [run.updates[-1].metrics for run in runs if run.updates]
    with_peak = all("time/mfu" in metrics for metrics in last if "time/tflops" in metrics)
    for key, title, how, share in _OF_UPDATES:
        if key == "time/tflops" and with_peak:
            continue
        plot = by_update(runs, labels, key, title, how, percent=share, include=(0, 0))
        if plot.drawing is not None or key in ("time/seconds", "time/tokens_per_second"):
            found.append(plot)
    return found


def _phases(run: RunData) -> dict[int, dict[str, float]]:
    """The seconds of training by iteration and phase; {} if the run did not log phases."""
    found: dict[int, dict[str, float]] = {}
    for update in run.updates:
        for phase in (*PHASES, *AFTER):
            if (seconds := update.metrics.get(f"time/{phase}")) is not None:
                of = found.setdefault(update.iteration, {})
                of[phase] = of.get(phase, 0.0) + seconds
    return found


def _strips(
    seconds: Sequence[Mapping[int, Mapping[str, float]]],
    labels: Sequence[str],
    names: Iterable[str],
    title: str,
    key: str,
    alt: str,
    how: str,
) -> list[Plot]:
    """Draws the seconds of each run as stacked bars, one bar per iteration, one part per name."""
    names, plots = list(dict.fromkeys(names)), []
    longest = max((sum(row.values()) for rows in seconds for row in rows.values()), default=0.0)
    unit, scale = ("hours", 3600) if longest > 7200 else ("minutes", 60)
    unit, scale = (unit, scale) if longest > 180 else ("seconds", 1)
    for index, (rows, label) in enumerate(zip(seconds, labels, strict=True)):
        rows = {k: row for k, row in rows.items() if sum(row.values())}
        parts = []
        for name in (n for n in names if any(row.get(n) for row in rows.values())):
            values = [row.get(name, 0.0) / scale for row in rows.values()]
            colour = f"c{names.index(name) % 6}"
            parts.append(Part(colour, values, [number(v) for v in values], name))
        words = " ".join(
            f"Iteration {k}: " + ", ".join(f"{n} {number(s)} s" for n, s in row.items()) + "."
            for k, row in rows.items()
        )
        drawing = None
        if rows:
            drawing = strips(
                [f"iteration {k}" for k in rows], parts, key=f"{key}-{index}",
                alt=f"{alt} {words}", xlabel=unit, longest=longest / scale, title=title,
            )  # fmt: skip
        legend = tuple((swatch(Style(part.colour), block=True), part.label) for part in parts)
        shown = f"{title}: {label}" if len(labels) > 1 else title
        plots.append(Plot(shown, how, drawing, legend))
    return plots
