"""Links between files of the repository work, and CONTRIBUTING's example diff still applies."""

import re
import unicodedata

import pages
import pytest

LINK = re.compile(
    r"(?<!\!)\[[^\]]*\]\((?!https?:|mailto:)([^)\s]*)\)|!\[[^\]]*\]\((?!https?:)([^)\s]+)\)"
)


def anchors(text):
    """The anchors of a page's headings, as GitHub and the site make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = "".join(c for c in words if c in " -_" or unicodedata.category(c)[0] in "LN")
        found.add(kept.replace(" ", "-"))
        slug = re.sub(r"[^\w\s-]+", "-", words)  # MyST's anchors keep a dash for a sign
        found.add(re.sub(r"[\s-]+", "-", slug).strip("-"))
    return found


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for found in LINK.finditer(text):
        name, _, anchor = (found[1] or found[2] or "").partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{found[0]} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), (
                f"{found[0]}: no such heading"
            )


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_no_line_begins_with_a_per_cent_sign(page):
    """The site would take it for a comment and leave the line out."""
    assert not re.findall(r"^ *%.*", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_what_the_first_change_takes_away_is_there():
    """The diff in CONTRIBUTING.md is of the code as it is: its context, and what it removes."""
    diffs = pages.blocks((pages.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "diff")
    assert len(diffs) >= 3
    for diff in diffs:
        file = re.search(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)[1]
        source = (pages.ROOT / file).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
            before = [line[1:] for line in hunk.splitlines() if line[:1] in " -"]
            assert "\n".join(before) in source, file
