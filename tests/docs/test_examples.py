"""The pages' examples run: Python code on a finished run, the README's block on a tiny model."""

import re

import pages
import pytest
from typer.testing import CliRunner

from selm_jax.cli import app
from selm_jax.feedback.ranker import BUILT_IN
from selm_jax.objectives.build import TABLE


def python_of(page):
    """The blocks of a page that read a run."""
    found = pages.blocks((pages.ROOT / "docs" / page).read_text(encoding="utf-8"), "python")
    return [block for block in found if "runs/quickstart" in block]


@pytest.mark.parametrize("page", ["metrics.md", "files.md", "troubleshooting.md"])
def test_what_reads_a_run_runs(page, reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    found = python_of(page)
    assert found
    for block in found:
        exec(block, {})  # noqa: S102 (lines of our own pages)
    assert capsys.readouterr().out


def test_the_settings_of_a_section_are_told():
    told = CliRunner().invoke(app, ["settings", "training"])
    assert told.exit_code == 0, told.output


def test_the_readme_has_the_lines_that_the_page_on_python_has():
    """Those are run on a tiny model by tests/api/test_ten_lines.py."""
    readme = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    lines = pages.blocks((pages.ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "python")[0]
    assert lines in pages.blocks(readme, "python")


def test_the_readme_names_every_loss_and_ranker():
    readme = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    for row, known in (("Losses", TABLE), ("Rankers", BUILT_IN)):
        (line,) = re.findall(rf"^\| \*\*{row}\*\* \|.*$", readme, re.MULTILINE)
        assert set(known) <= set(re.findall(r"`(\w+)`", line))


def test_the_readme_has_what_ci_takes_from_it():
    """`.ci/run` installs, tests and runs by these lines."""
    readme = (pages.ROOT / "README.md").read_text(encoding="utf-8")
    script = (pages.ROOT / ".ci" / "run").read_text()
    for pattern in re.findall(r"grep (?:-m 1|-qx) '?(\S+?(?: \S+?)*?)'? README\.md", script):
        assert re.search(pattern if "^" in pattern else f"^{pattern}$", readme, re.MULTILINE), (
            pattern
        )


def test_the_page_of_settings_is_what_its_script_writes():
    import runpy

    script = runpy.run_path(str(pages.ROOT / "docs" / "settings.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"]()
