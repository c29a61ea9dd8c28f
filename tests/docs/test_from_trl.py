"""The page for TRL users names every argument of TRL's configurations, and real settings only."""

import json
import re
from pathlib import Path

import pytest

from selm_jax.config.reference import reference, sections
from selm_jax.objectives.build import TABLE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
NAMES = json.loads((ROOT / "tests" / "golden" / "trl_config_names.json").read_text())
SETTINGS = {setting.key for section in sections() for setting in reference(section)}


def names_in(text):
    return set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize(
    "group", ["TrainingArguments", "DPOConfig", "OnlineDPOConfig", "XPOConfig", "NashMDConfig"]
)
def test_every_argument_stands_in_the_table_of_its_class(group):
    section = re.search(rf"^## `{group}`\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    first = "\n".join(row.split(" | ")[0] for row in section[1].splitlines())
    assert not set(NAMES[group]) - names_in(first)


def test_the_base_class_of_trl_is_covered():
    assert not set(NAMES["_BaseConfig"]) - names_in(PAGE)


def test_the_page_says_which_versions_it_maps():
    for version in NAMES["versions"].values():
        assert version in PAGE


def test_settings_that_are_named_exist():
    named = set(re.findall(r"`((?:\w+\.)+\w+)(?::[^`]*)?`", PAGE))
    groups = {section.split(".")[0] for section in sections() if section} | {"objective"}
    ours = {name for name in named if name.split(".")[0] in groups}
    unknown = {n for n in ours if n not in SETTINGS and not n.startswith("objective.")}
    assert len(ours) > 40
    assert not unknown


def test_losses_that_are_named_exist():
    named = set(re.findall(r"loss: (\w+)", PAGE))
    assert named <= set(TABLE)
