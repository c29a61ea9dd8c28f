"""The values of a setting that has choices stand in one place: where they are declared or done."""

import ast
from pathlib import Path
from typing import get_args

import pytest

import selm_jax
from selm_jax.config import kinds
from selm_jax.models.decoder import REMAT
from selm_jax.parallel.rules import PRESETS
from selm_jax.preferences.acquisition import DESIGNS, MODEL_BASED
from selm_jax.rollout.dialects import DIALECTS
from selm_jax.training.optimizer import OPTIMIZERS, SCHEDULES

PACKAGE = Path(selm_jax.__file__).parent


def texts(node):
    """The texts of a list, tuple or set of nothing else; of one alone, it may be anything."""
    elements = getattr(node, "elts", [])
    found = frozenset(getattr(each, "value", None) for each in elements)
    return found if len(found) > 1 and all(isinstance(x, str) for x in found) else None


def typed(source):
    """The choices that a text declares by Literal, and the lists of texts that it has beside."""
    nodes = list(ast.walk(ast.parse(source)))
    literals = [
        node.slice
        for node in nodes
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) == "Literal"
    ]
    inside = {id(node) for node in literals}
    lists = [node for node in nodes if id(node) not in inside]
    return [x for x in map(texts, literals) if x], [x for x in map(texts, lists) if x]


def test_no_choices_are_typed_twice():
    literals, lists = {}, {}
    for file in sorted(PACKAGE.rglob("*.py")):
        declared, beside = typed(file.read_text(encoding="utf-8"))
        name = str(file.relative_to(PACKAGE))
        for found, where in ((declared, literals), (beside, lists)):
            for each in found:
                where.setdefault(each, []).append(name)
    assert len(literals) > 10
    twice = {tuple(each): [*where, *lists.get(each, [])] for each, where in literals.items()}
    assert {each: where for each, where in twice.items() if len(where) > 1} == {}


def test_what_is_looked_for_is_found():
    source = 'A = Literal["x", "y"]\nB = ("y", "x")\nC = ["x", 1]\nD = Literal["auto", A]'
    assert typed(source) == ([{"x", "y"}], [{"x", "y"}])


@pytest.mark.parametrize(
    ("choices", "table"),
    [
        (kinds.Schedule, SCHEDULES),
        (kinds.Optimizer, OPTIMIZERS),
        (kinds.Remat, REMAT),
        (kinds.Preset, PRESETS),
        (kinds.Engine, DIALECTS),
        (kinds.ModelBased, MODEL_BASED),
        (kinds.Design, DESIGNS),
    ],
    ids=["schedule", "optimizer", "remat", "preset", "engine", "acquisition", "design"],
)
def test_every_choice_is_done_and_nothing_else_is(choices, table):
    assert set(get_args(choices)) == set(table)
