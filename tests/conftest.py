"""Eight devices on any machine, and the slow obvious forms that fast code is held against."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

# Before jax is imported for the first time: it reads both when it starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_EIGHT = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT}".strip()

# Threads for eight devices however few the cores: a program waits in its collectives for all its
# devices, and with fewer threads two programs in flight can wait for each other for ever.
os.environ.setdefault("PJRT_NPROC", "32")

# If a shell starts the tests in the background, they and all their processes would ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from markupsafe import Markup

from selm_jax.models.config import DecoderConfig, LayerKind, Rope
from selm_jax.models.decoder import Decoder, Params, abstract_params, logits
from selm_jax.plan.topology import has_libtpu
from selm_jax.report.drawn import Drawing
from selm_jax.weights.sources import SourceError, _converted, cache_root, resolve
from selm_jax.weights.wheels import WHEELS

# No test fails because a machine is busy, and every run tries the same examples.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

# Every compiled program holds mappings of memory, and Linux grants a process 65,530: beyond them
# the compiler dies of a segmentation fault. One run of all tests compiles more than that.
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 20_000

TINY = DecoderConfig(
    vocab_size=96,
    embed=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=64,
    norm_eps=1e-5,
    kinds=(LayerKind(Rope(1e4)),) * 2,
    tied=False,
    max_positions=2048,
    architecture="LlamaForCausalLM",
)
FIRST = ("resume", "parallel", "sweep", "run")  # folders whose tests come first if time is short
STARTED = time.monotonic()
WHOLE = {Path(__file__).parent / name for name in ("parallel", "resume")}
REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--begin-within", type=float, default=math.inf, metavar="SECONDS",
        help="skip the tests whose turn comes later than this after the start",
    )  # fmt: skip
    parser.addoption(
        "--turn", type=int, default=0, metavar="NUMBER",
        help="with --begin-within, begin elsewhere: each file is among the first fifth in one of "
        "five consecutive turns",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Lowers XLA's optimization level for quick tests, which then compile in half the time.

    `-m slow` leaves out the slow tests that are also long: ask for those by `-m long`.

    Slow tests run what users run. `pytest tests/parallel tests/resume` includes the slow tests,
    because most tests of these folders are slow. Compiled programs are kept in pytest's own cache,
    since many tests compile the same ones.
    """
    if config.option.markexpr == "slow":
        config.option.markexpr = "slow and not long"
    asked = any(argument.startswith("-m") for argument in config.invocation_params.args)
    if not asked and {Path(each).resolve() for each in config.args} <= WHOLE:
        config.option.markexpr = "not long and not gpu"
    if "not slow" in config.option.markexpr:  # before the first program: jax reads it then
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
        if jax.__version_info__ < (0, 11):  # a flag that is not known any more is fatal
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    if (kept := getattr(config, "cache", None)) is not None:  # not with -p no:cacheprovider
        jax.config.update("jax_compilation_cache_dir", str(kept.mkdir("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow_except"):
            asked = f"{item.callspec.id}-"  # a word is the whole id, or its first parts
            if not any(asked.startswith(f"{word}-") for word in mark.args):
                item.add_marker("slow")
    if config.option.begin_within < math.inf:  # what is skipped should be what is rather known
        items[:] = turned(items, config.option.turn)
        items.sort(key=lambda item: item.path.parent.name not in FIRST)


def turned(items: list[pytest.Item], turn: int) -> list[pytest.Item]:
    """The tests of all files, from another file on in each of five consecutive turns."""
    files = list(dict.fromkeys(item.path for item in items))
    first = turn % 5 * len(files) // 5
    place = {file: (i - first) % len(files) for i, file in enumerate(files)}
    return sorted(items, key=lambda item: place[item.path])


def pytest_collection_finish() -> None:
    """Takes what is imported now out of every later collection of garbage.

    A stage of a run ends with a collection, which takes half a second if it looks at all modules.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("libtpu") and not has_libtpu():
        pytest.skip("libtpu is not installed: pip install 'selm_jax[tpu]'")
    if time.monotonic() - STARTED > item.config.option.begin_within:
        pytest.skip(f"{item.nodeid} came too late (--begin-within): run it by itself")


@pytest.hookimpl(trylast=True)  # after the fixtures, which hold programs, too
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets go of all compiled programs if they hold many mappings of memory.

    This looks after each slow test, because a few of them compile as much as a module of others.
    """
    if item.get_closest_marker("slow") is None and nextitem and nextitem.path == item.path:
        return
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()


# Where tests look at figures. Elsewhere pages have none, since drawing takes as long as a tiny run.
LOOKS_AT_FIGURES = ("report", "lab", "sweep", "docs", "run/test_looking.py")


@pytest.fixture(scope="module", autouse=True)
def pages_without_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves empty places for the figures of reports."""
    here = request.path.relative_to(Path(__file__).parent).as_posix()
    with pytest.MonkeyPatch.context() as patch:
        if not here.startswith(LOOKS_AT_FIGURES):
            nothing = Drawing(Markup('<svg class="plot"></svg>'), b"", "")
            patch.setattr("selm_jax.report.plots.drawn", lambda *of, **named: nothing)
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny.experiment` with its finished `run` of two iterations on one device.

    All files of tests, on all workers of a session, look at the same one, so nobody may change it.
    """
    import tiny
    from rich.console import Console

    from selm_jax import config
    from selm_jax.iterate import iterate
    from selm_jax.run.run import Run

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "finished_run"
    with FileLock(f"{shared}.lock"), pytest.MonkeyPatch.context() as patch:
        if not (shared / "run" / "report.html").exists():
            tiny.on_first_device(patch)
            iterate(Run(config.load(tiny.experiment(shared)), Console(quiet=True)))
    return shared


@pytest.fixture(scope="session")
def tiny() -> Callable[..., DecoderConfig]:
    """The facts of a tiny decoder; keywords change them. With a window it is a Mistral.

    Besides the fields of `DecoderConfig`: layers, rope_theta and window, the same in all layers.
    """

    def make(*, layers=2, rope_theta=1e4, window=None, **changes) -> DecoderConfig:
        if window:
            changes.setdefault("architecture", "MistralForCausalLM")
        kinds = (LayerKind(Rope(rope_theta), window),) * layers
        return dataclasses.replace(TINY, **({"kinds": kinds} | changes))

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Params]:
    """Random parameters, stacked. Norm scales are random too: at 1 they would hide mistakes."""

    @cache
    def make(config: DecoderConfig, seed: int = 0) -> Params:
        rng = np.random.default_rng(seed)

        def some(path, x):
            middle = 1 if path[-1].key in ("scale", "layer_scale") else 0
            return jnp.asarray(rng.normal(middle, 0.25, x.shape), jnp.float32)

        return jax.tree_util.tree_map_with_path(some, nn.unbox(abstract_params(config)))

    return make


@pytest.fixture(scope="session")
def all_logits() -> Callable[..., jax.Array]:
    """Full logits of right-padded rows, each row a sequence of its own. [rows, time, vocab]"""

    def run(decoder: Decoder, params: Params, tokens) -> jax.Array:
        rows, time = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(time), (rows, time))
        hidden, _ = decoder.apply({"params": params}, tokens, positions)
        return logits(decoder.config, params, hidden)

    return run


@pytest.fixture(scope="session")
def alone_logps(all_logits) -> Callable[..., jax.Array]:
    """log pi(response | prompt), each prompt + response in a row by itself: the oracle of packing.

    tokens [n, time] holds prompt + response, right-padded; starts and stops bound the response.
    """

    def logps(decoder: Decoder, params: Params, tokens, starts, stops) -> jax.Array:
        table = jax.nn.log_softmax(all_logits(decoder, params, tokens).astype(jnp.float32))
        of_next = jnp.take_along_axis(table[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        at = jnp.arange(1, tokens.shape[1])
        scored = (at >= starts[:, None]) & (at < stops[:, None])
        return jnp.where(scored, of_next, 0).sum(-1)

    return logps


@pytest.fixture(scope="session")
def spread() -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Examples as the rows of `alone_logps`, one per response, in order; empty rows at the end."""

    def rows(examples: Sequence, count: int, time: int):
        tokens = np.zeros((count, time), np.int32)
        starts, stops = np.zeros(count, np.int32), np.zeros(count, np.int32)
        both = [(e.prompt, r) for e in examples for r in e.responses]
        for i, (prompt, response) in enumerate(both):
            stops[i], starts[i] = len(prompt) + len(response), len(prompt)
            tokens[i, : stops[i]] = (*prompt, *response)
        return tokens, starts, stops

    return rows


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, if it was converted on this machine before."""
    folder = _converted(cache_root(), f"{REAL.replace('/', '--')}-wheel", WHEELS[REAL].gguf_sha256)
    if not folder.is_dir():
        pytest.skip(f"{REAL} is not in the cache ({folder}); `selm run` with it puts it there")
    try:
        return resolve(str(folder)).path
    except SourceError as e:
        pytest.skip(f"{REAL} in the cache is not usable: {e}")


@pytest.fixture(scope="session")
def gs_server() -> Iterator:
    """Google's store, as fake-gcs-server, behind a proxy that can fail."""
    import buckets

    with buckets.google() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def s3_server() -> Iterator:
    """Amazon's store, as moto, behind a proxy that can fail."""
    import buckets

    with buckets.moto() as proxy:
        yield proxy


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """The url of a new bucket in each of the stores, to which the environment leads."""
    import buckets

    proxy = request.getfixturevalue(f"{request.param}_server")
    url, environment = buckets.new_bucket(request.param, proxy)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield url
    proxy.faults.clear()


@pytest.fixture
def faults(bucket: str, request: pytest.FixtureRequest):
    """The proxy before the bucket: put what shall go wrong into its `faults`."""
    return request.getfixturevalue(f"{bucket[:2]}_server")


@pytest.fixture
def parity(record_property) -> Callable[[str, str, float], None]:
    """Records how much a family's logits differ in a form; the summary lists the worst ones."""

    def note(family: str, form: str, difference: float) -> None:
        record_property("parity", (family, form, float(difference)))  # for xdist: no numpy

    return note


@pytest.fixture
def tell(record_property) -> Callable[[str, str], None]:
    """Notes a line for the session's summary, under a heading."""

    def note(heading: str, line: str) -> None:
        record_property("told", (heading, line))

    return note


@pytest.fixture
def tried(tell) -> Callable[[str], None]:
    """Notes what a test has tried, and what came of it; the session's summary shows it."""
    return lambda line: tell("tried", line)


@pytest.fixture
def harness_parity(tell) -> Callable[[str, float], None]:
    """Notes by how much the harness's numbers differ from those of its own HF model."""
    heading = "lm-eval: largest difference from its own HF model, in nats"
    return lambda what, difference: tell(heading, f"{what:24} {difference:.1e}")


@pytest.fixture
def published(tell) -> Callable[[str, str], None]:
    """Notes a published figure or format that was met."""
    return lambda what, says: tell("published figures and formats", f"{what:44} {says}")


def pytest_terminal_summary(terminalreporter) -> None:
    worst: dict[str, dict[str, float]] = {}
    told: dict[str, list[str]] = {}
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == "told":
                told.setdefault(value[0], []).append(value[1])
            if key == "parity":
                family, form, difference = value
                forms = worst.setdefault(family, {})
                forms[form] = max(difference, forms.get(form, 0.0))
    if worst:
        terminalreporter.section("largest differences of logits, float32")
        for family, forms in worst.items():
            listed = "  ".join(f"{form} {value:.1e}" for form, value in forms.items())
            terminalreporter.write_line(f"{family:14} {listed}")
    for heading, lines in told.items():
        terminalreporter.section(heading)
        for line in lines:
            terminalreporter.write_line(line)
