"""The pages of the repository, and the commands that stand on them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for folder, pattern in (
        ("", "*.md"),
        ("docs", "*.md"),
        ("experiments", "**/*.md"),
        ("benchmarks", "*.md"),
        ("tpu_setup", "*.md"),
    )
    for page in (ROOT / folder).glob(pattern)
)
_FENCE = re.compile(r"^(`{3,})(\w*).*?\n(.*?)^\1", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("selm ", "pytest", "python ", "pip install", "sphinx-build")


class Command(NamedTuple):
    """One command of a page, without the words that explain it."""

    page: str
    text: str

    @property
    def is_form(self) -> bool:
        """Whether it shows a form, with placeholders, and is no command to be typed."""
        return bool(re.search(r"\[[^\]]*\]|\|| \.\.\.|\b[A-Z]{3,}\b(?!=)", self.text.split("'")[0]))

    def words(self) -> list[str]:
        """Its words, without variables of the environment before it."""
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        return words


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for _, named, body in _FENCE.findall(text) if named == language]


def commands() -> Iterator[Command]:
    """The commands in blocks without a language, and in indented blocks, of all pages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        indented = "\n".join(re.findall(r"^    (.*\S.*)$", _FENCE.sub("", text), re.MULTILINE))
        for block in [*blocks(text, ""), indented]:
            for line in _whole_lines(block):
                for part in re.split(r"; (?=selm )", line):
                    command = re.split(r"\s{3,}(?!.*')", part.strip())[0]
                    if command.removeprefix("PYTHONPATH=. ").startswith(_PROGRAMS):
                        yield Command(page.relative_to(ROOT).as_posix(), command)


def _whole_lines(block: str) -> Iterator[str]:
    """Its lines, those put together that end in a backslash or within a quotation."""
    whole = ""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        whole = f"{whole} {line.strip()}" if whole else line
        if whole.split("  #")[0].count("'") % 2 == 0 or not whole.startswith(("selm", "PYTHON")):
            yield whole
            whole = ""


def mentions() -> Iterator[Command]:
    """Commands in the text of pages, between backticks."""
    for page in PAGES:
        prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for found in re.findall(r"`(selm [^`]+)`", prose):
            yield Command(page.relative_to(ROOT).as_posix(), " ".join(found.split()))
