"""`selm settings [SECTION]`: prints what each setting means, and its allowed values."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from selm_jax.config import ConfigError
from selm_jax.config.reference import Setting, reference, sections
from selm_jax.shell.words import did_you_mean


def lines(section: str | None = None, width: int | None = None) -> Iterator[str]:
    """Yields, for the terminal, lines that describe one group, one key or all settings.

    Raises:
      ConfigError: there is no such group or key.
    """
    width = width or min(shutil.get_terminal_size().columns, 100)
    groups = {name: list(reference(name)) for name in sections()}
    if section is not None and section not in groups:
        found = [each for group in groups.values() for each in group if each.key == section]
        if not found:
            known = [*filter(None, groups), *(s.key for group in groups.values() for s in group)]
            raise ConfigError(
                f"{section}: no such group or setting{did_you_mean(section, known)} Groups: "
                f"{', '.join(filter(None, groups))}"
            )
        groups = {section: found}
    for name, group in groups.items():
        if section is None or name == section:
            yield f"--- {name or 'at the top of the file'} ---"
            for each in group:
                yield from _about(each, width)
            yield ""


def _about(setting: Setting, width: int) -> Iterator[str]:
    default = {None: "must be given", "": "a group"}.get(setting.default, setting.default)
    yield f"{setting.key}: {default}"
    for text in (setting.values.replace("`", ""), setting.text):
        yield from textwrap.wrap(
            text, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
