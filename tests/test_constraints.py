"""constraints.txt has one version of every package in pyproject.toml, for each Python version."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


def asked_for() -> list[Requirement]:
    """The requirements of the extras `test`, `wandb` and `docs`, without the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = (each for name in ("test", "wandb", "docs") for each in extras[name])
    found, waiting, seen = [], [*project["dependencies"], *locked], set()
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name != project["name"]:
            found.append(requirement)
            continue
        assert requirement.extras <= extras.keys(), (
            "an old pip takes an extra only as it is spelled"
        )
        for extra in requirement.extras - seen:
            seen.add(extra)
            waiting += extras[extra]
    return found


def pins(python: str) -> dict[str, str]:
    """The version of each package on Linux with this Python."""
    found: dict[str, str] = {}
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(here):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} stands twice for Python {python}"
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[name] = specifier.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_that_is_asked_for_has_one_version_that_fits(python):
    known = pins(python)
    for requirement in asked_for():
        version = known[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_extras_have_names_that_every_pip_takes():
    """pip before 23.3 compares names as they are written, and metadata spells them with hyphens."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in project["optional-dependencies"]:
        assert extra == canonicalize_name(extra)
