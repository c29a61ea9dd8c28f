"""Renders untrusted text as HTML: Markdown without raw HTML, images or dangerous links."""

from __future__ import annotations

import html

from markdown_it import MarkdownIt

# Rendering a longer text takes seconds, and such texts are rarely Markdown.
LONGEST_MARKDOWN = 20_000

# C0 controls and DEL are shown by number, because few fonts have Unicode's symbols for them. Tabs
# and line ends stay as they are.
_CONTROLS: dict[int, int | str] = {
    code: f"⟨U+{code:04X}⟩" for code in (*range(0x20), 0x7F) if chr(code) not in "\t\n\r"
}
# A lone surrogate has no UTF-8 encoding, so the reply would fail.
_CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)

# Marks that change the direction of the following text: they work in Markdown, and are shown as
# text in plain text.
_TURNS = {c: f"⟨U+{c:04X}⟩" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}

_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def visible(text: str) -> str:
    """Replaces control characters and lone surrogates in a text by visible characters."""
    return text.translate(_CONTROLS)


def markdown(text: str) -> str:
    """Renders Markdown as safe HTML; a very long text is shown as plain text instead.

    Tags in the text are shown as text, images as links, and links that run code as text. A single
    line end breaks the line, as models intend.
    """
    if len(text) > LONGEST_MARKDOWN:
        return plain(text)
    return _MARKDOWN.render(visible(text))


def plain(text: str) -> str:
    """Escapes a text as safe HTML that shows it unchanged; direction marks become visible."""
    return f'<pre class="plain">{html.escape(visible(text).translate(_TURNS))}</pre>'


def _open_link(self, tokens, index, options, env) -> str:
    # Opens a new tab that does not learn this page's address, which contains the token.
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


def _open_cell(self, tokens, index, options, env) -> str:
    # The page's security policy forbids style attributes; its style sheet has these classes.
    style = str(tokens[index].attrs.pop("style", ""))
    if side := style.removeprefix("text-align:"):
        tokens[index].attrSet("class", side)
    return self.renderToken(tokens, index, options, env)


_MARKDOWN.add_render_rule("link_open", _open_link)
_MARKDOWN.add_render_rule("th_open", _open_cell)
_MARKDOWN.add_render_rule("td_open", _open_cell)
_MARKDOWN.options["breaks"] = True
