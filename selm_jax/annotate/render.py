"""Untrusted text as HTML: markdown without raw HTML, images or dangerous links."""

from __future__ import annotations

import html

from markdown_it import MarkdownIt

# Markdown of a text this long takes seconds, and is rarely meant.
LONGEST_MARKDOWN = 20_000

# C0 controls and DEL by their numbers: few fonts have Unicode's pictures of them. Tab and line ends
# are themselves.
_CONTROLS: dict[int, int | str] = {
    code: f"⟨U+{code:04X}⟩" for code in (*range(0x20), 0x7F) if chr(code) not in "\t\n\r"
}
# A lone surrogate has no UTF-8 and would stop the reply.
_CONTROLS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)

# Marks that turn the direction of what follows: obeyed in markdown, shown in plain text.
_TURNS = {c: f"⟨U+{c:04X}⟩" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}

_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


def visible(text: str) -> str:
    """The text with control characters and lone surrogates as characters that can be seen."""
    return text.translate(_CONTROLS)


def markdown(text: str) -> str:
    """Safe HTML of a text in markdown; one that is too long stays as it is.

    Tags in the text are shown, not obeyed; an image is shown as a link; links that run code are
    shown as text. A single line end breaks the line, as models mean it.
    """
    if len(text) > LONGEST_MARKDOWN:
        return plain(text)
    return _MARKDOWN.render(visible(text))


def plain(text: str) -> str:
    """Safe HTML of a text as it is, marks of direction shown."""
    return f'<pre class="plain">{html.escape(visible(text).translate(_TURNS))}</pre>'


def _open_link(self, tokens, index, options, env) -> str:
    # In a tab of its own, which learns nothing of this page: its address holds the token.
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


def _open_cell(self, tokens, index, options, env) -> str:
    # The page's policy refuses styles in attributes; its own sheet knows these classes.
    style = str(tokens[index].attrs.pop("style", ""))
    if side := style.removeprefix("text-align:"):
        tokens[index].attrSet("class", side)
    return self.renderToken(tokens, index, options, env)


_MARKDOWN.add_render_rule("link_open", _open_link)
_MARKDOWN.add_render_rule("th_open", _open_cell)
_MARKDOWN.add_render_rule("td_open", _open_cell)
_MARKDOWN.options["breaks"] = True
