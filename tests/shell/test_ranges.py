"""Every number in an experiment has a range, and values outside it are refused on reading."""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import typing
from pathlib import Path

import pytest
import yaml

from selm_jax import config
from selm_jax.config import ConfigError, Experiment
from selm_jax.feedback import ranker
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.objectives import build as objectives
from selm_jax.objectives.build import TABLE
from selm_jax.objectives.losses import ObjectiveError
from selm_jax.objectives.objective import CHOICES
from selm_jax.shell.ranges import Range, ranges_of

TREE = {
    "output": "runs/x",
    "iterations": 1,
    "model": {"source": "m"},
    "data": {"train": "t", "chosen": "c", "rejected": "r"},
    "candidates": {"dataset": True, "samples": 3},
    "objective": {"loss": "selm", "beta": 0.1, "alpha": 1e-3},
    "training": {"learning_rate": 5e-7, "global_batch": 8},
    "lora": {"rank": 4, "alpha": 8},
    "rollout": {"remote": {"engine": "vllm"}},
    "feedback": {"budget": 8},
}


def leaves(hint):
    """The plain types that a hint is made of."""
    inner = typing.get_args(hint)
    return set().union(*map(leaves, inner)) if inner else {hint}


def numbers(cls=Experiment, prefix=()):
    """Path, hint and range of every field that is a number (or several)."""
    declared = ranges_of(cls)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner = [hint, *typing.get_args(hint)]
        groups = [
            each for each in inner if isinstance(each, type) and dataclasses.is_dataclass(each)
        ]
        if groups:
            yield from numbers(groups[0], (*prefix, name))
        elif {int, float} & {each for each in leaves(hint) if isinstance(each, type)}:
            yield (*prefix, name), hint, declared.get(name)


NUMBERS = {".".join(path): (hint, range) for path, hint, range in numbers()}


def written(path, value):
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    group = tree
    *parents, last = path.split(".")
    for key in parents:
        group = group.setdefault(key, {})
    group[last] = value
    return tree


def test_every_number_is_found():
    assert len(NUMBERS) > 50
    assert {"training.rows", "lora.alpha", "rollout.remote.timeout", "feedback.labels.flip"} <= set(
        NUMBERS
    )


@pytest.mark.parametrize("path", NUMBERS)
def test_what_is_no_number_of_the_range_is_refused(path):
    hint, range = NUMBERS[path]
    assert isinstance(range, Range), f"{path} has no range"
    whole = int in leaves(hint)
    assert range.whole == whole
    wrong = [math.nan, math.inf, -math.inf, True, False, "8", "fast", [], {"a": 1}, 10**400]
    wrong += [range.low - 1, range.high + 1] if whole else [math.nextafter(range.low, -math.inf)]
    wrong += [1.5] * whole + [range.low] * range.above + [range.high] * range.below
    if math.isfinite(range.high) and not whole:
        wrong.append(math.nextafter(range.high, math.inf))
    wrong += [x for x in (-1, -0.5) if x < range.low]
    wrong = [x for x in wrong if not any(x is not True and x == also for also in range.also)]
    for value in wrong:
        if path == "training.learning_rate" and value == []:
            continue  # a list, of none: another message
        with pytest.raises(ConfigError) as error:
            config.parse(written(path, value))
        message = str(error.value)
        assert f"\n  {path}" in message and " was expected" in message, value
        assert f"{range} was expected" in message, value
    right = [range.high] if math.isfinite(range.high) and not range.below else []
    right += [x for x in range.also] + ([] if range.above else [range.low])
    for value in right:
        try:
            config.parse(written(path, value))
        except ConfigError as error:  # in its range, but in contradiction to another setting
            assert str(range) not in str(error)


MEANT = {  # what other programs give a meaning to, or what is often meant
    "training.clip": [(0, "null switches clipping off"), (-1, "null switches")],
    "rollout.temperature": [(0, "candidates.greedy: 1")],
    "rollout.top_k": [(-1, "0 keeps all tokens")],
    "rollout.top_p": [(0, "1 keeps all"), (95, "1 keeps all")],
    "rollout.min_p": [(2, "0 keeps all")],
    "training.warmup_ratio": [(10, "write 0.1 for 10 per cent")],
    "training.learning_rate": [(-1e-6, "above 0"), (0, "above 0")],
    "data.limit": [(-1, "null takes all"), (0, "null takes all")],
    "data.heldout_limit": [(-1, "null takes all")],
    "feedback.budget": [(-1, "null takes all"), (0, "null takes all")],
    "training.rows": [(1e12, "1,048,576")],
    "seed": [(-1, "from 0 to"), (2**32, "from 0 to 2,147,483,647")],
    "feedback.min_margin": [(-1, "at least 0")],
    "evaluation.samples": [(-1, "from 1"), (0, "from 1")],
    "compute.tensor": [(0, "or -1")],
    "candidates.greedy": [(2, "0 or 1")],
}


@pytest.mark.parametrize("path", MEANT)
def test_the_message_says_what_to_write_instead(path):
    for value, said in MEANT[path]:
        with pytest.raises(ConfigError, match=f"{path}(.0)?: {value!r}, ") as error:
            config.parse(written(path, value))
        assert said in str(error.value)


def test_a_whole_number_may_be_written_with_an_exponent(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(TREE))
    experiment = config.load(file, ["data.limit=1e3", "training.epochs=2.0"])
    assert (experiment.data.limit, experiment.training.epochs) == (1000, 2)
    assert type(experiment.data.limit) is int
    for text in ("yes", "1", "'true'"):
        with pytest.raises(ConfigError, match="data.shuffle: .*true or false was expected"):
            config.load(file, [f"data.shuffle={text}"])


def test_numbers_that_no_table_knows_are_finite():
    for group in ("objective", "feedback.settings", "text.template"):
        with pytest.raises(ConfigError, match=f"{group}.x.0: nan, a finite number was expected"):
            config.parse(written(f"{group}.x", [math.nan]))


def test_a_batch_can_be_counted_in_int32():
    tree = written("training.rows", 2**20)
    tree["training"]["row_length"] = 2**12
    with pytest.raises(ConfigError, match="training.rows: .*4,294,967,296 tokens at once"):
        config.parse(tree)


@pytest.mark.parametrize(
    "range,text",
    [
        (Range(), "a finite number"),
        (Range(0), "a number of at least 0"),
        (Range(0, above=True), "a number above 0"),
        (Range(0, 1), "a number from 0 to 1"),
        (Range(0, 1, below=True), "a number of at least 0 and below 1"),
        (Range(0, 1, above=True), "a number above 0 and at most 1"),
        (Range(1, 4000, whole=True, also=(-1,)), "a whole number from 1 to 4,000 or -1"),
        (Range(0, 1, whole=True), "0 or 1"),
    ],
)
def test_a_range_in_words(range, text):
    assert str(range) == text


SETTINGS = [
    ("objective", name, key)
    for name, factory in TABLE.items()
    for key in inspect.signature(factory).parameters
    if key not in CHOICES
] + [
    ("ranker", name, key)
    for name, place in ranker.BUILT_IN.items()
    for key in ranges_of(getattr(importlib.import_module(place.split(":")[0]), place.split(":")[1]))
]
GIVEN = {  # what must be given besides
    "judge": {"model": "m", "base_url": "http://127.0.0.1:1"},
    "pairrm": {"folder": "/nowhere"},
    "implicit_reward": {"reference": "/nowhere"},
    "reward_model": {"source": "/nowhere"},
}


@pytest.mark.parametrize("kind,name,key", SETTINGS)
def test_numbers_of_losses_and_rankers_are_checked_when_they_are_built(kind, name, key):
    build = {"objective": objectives.build_objective, "ranker": ranker.build_ranker}[kind]
    given = dict(GIVEN.get(name, {}))
    if kind == "objective":
        needed = inspect.signature(TABLE[name]).parameters.items()
        given |= {k: 0.1 for k, p in needed if p.default is p.empty}
    for value in (math.nan, math.inf, -math.inf, True, False, "1", "fast", [1], -7, -1e-9):
        with pytest.raises((ObjectiveError, FeedbackError), match=f"{key} is .*; expected a"):
            build(name, **(given | {key: value}))


def test_the_weight_of_a_part_is_a_number():
    for value in (math.nan, math.inf, True, "1", None):
        parts = [{"ranker": "length", "weight": value}]
        with pytest.raises(FeedbackError, match="part 1: weight is .*; expected a finite number"):
            ranker.build_ranker("mixture", parts=parts)


def test_every_number_of_a_builder_has_a_range():
    for name, place in [*ranker.BUILT_IN.items(), ("yours", ranker._USER_FUNCTION)]:
        module, _, function = place.partition(":")
        builder = getattr(importlib.import_module(module), function)
        hints = typing.get_type_hints(builder, include_extras=True)
        found = {
            key
            for key, hint in hints.items()
            if key != "return"
            and {int, float} & {each for each in leaves(hint) if isinstance(each, type)}
        }
        assert found == set(ranges_of(builder)), name


def test_the_page_of_all_settings_is_that_of_the_code():
    """`python docs/settings.py` writes it."""
    file = Path(__file__).parents[2] / "docs" / "settings.py"
    spec = importlib.util.spec_from_file_location("settings_page", file)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.page()
    assert file.with_suffix(".md").read_text(encoding="utf-8") == text
    for path, (_, range) in NUMBERS.items():
        (line,) = [
            each for each in text.splitlines() if f"| `{path}` |" in each or f"`{path}`**" in each
        ]
        assert str(range) in line
