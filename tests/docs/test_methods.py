"""The page of methods has one row for every loss that an experiment can name."""

import json
import re
from pathlib import Path

from selm_jax.objectives.build import REFUSED, TABLE, build_objective

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = {
    match[1]: [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))]
    for row in PAGE.split("\n## ")[0].splitlines()
    if (match := re.match(r"\| `(\w+)` ", row))
}
SETTINGS = {"beta": 0.1, "alpha": 0.01, "gamma": 0.1, "label_smoothing": 0.1, "ld_alpha": 0.5}


def test_every_loss_has_a_row_and_nothing_else_has():
    assert ROWS.keys() == TABLE.keys()
    assert all(f"`{name}`" in PAGE for name in REFUSED)


def test_the_readme_names_every_loss():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| \*\*Losses\*\* .*$", readme, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == TABLE.keys()


def test_what_a_method_needs_is_what_its_objective_says():
    for name, (_, _, needs, *_) in ROWS.items():
        parameters = TABLE[name].__code__.co_varnames[: TABLE[name].__code__.co_argcount]
        objective = build_objective(name, **{k: v for k, v in SETTINGS.items() if k in parameters})
        assert ("`explore`" in needs) == ("explore" in objective.roles), name
        assert ("a pair" in needs) == ({"chosen", "rejected"} <= {*objective.roles}
                                       and not objective.rates), name  # fmt: skip
        assert ("reference" in needs) != objective.reference_free, name
        assert ("scores" in needs) == objective.uses_scores, name


def test_tested_against_is_what_the_recorded_values_have():
    recorded = json.loads((ROOT / "tests" / "golden" / "trl_losses.json").read_text())
    for trl, part in recorded.items():
        version = ".".join(trl.split(".")[:2]).upper()
        names = {case["name"] for case in part["cases"]}
        said = {name for name, row in ROWS.items() if row[4] == version}
        assert said == names & TABLE.keys(), version
