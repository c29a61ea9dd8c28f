"""Reads YAML by the core schema of YAML 1.2, and records the line number of every value.

Values that YAML 1.1 would reinterpret stay as written: `042` is 42; `1:30`, `yes`, `no`, `on`,
`off` and `2024-07-26` are strings; `5e-7` is a number; only `true` and `false` are booleans. A
duplicate key is an error, and so is a tag of a programming language. Time and memory are bounded,
because every alias counts as the values that it stands for.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]
_BYTES, _VALUES, _DEPTH = 1 << 20, 20_000, 50

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BASED = {"0o": (re.compile("0o[0-7]+"), 8), "0x": (re.compile("0x[0-9a-fA-F]+"), 16)}
_WORDS: Mapping[str, Any] = {
    word: value
    for words, value in (
        (" ~ null Null NULL", None),
        ("true True TRUE", True),
        ("false False FALSE", False),
        (".inf .Inf .INF +.inf +.Inf +.INF", float("inf")),
        ("-.inf -.Inf -.INF", -float("inf")),
        (".nan .NaN .NAN", float("nan")),
    )
    for word in words.split(" ")
}
_PLAIN, _MERGE = "plain", "merge"
_TAG = "tag:yaml.org,2002:"


class YamlError(ValueError):
    """The text is not YAML, or is ambiguous. The message gives the line, but never its content."""


def scalar(text: str) -> Any:
    """Interprets an unquoted scalar: null, a boolean, a number, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 400:
        return text  # not a realistic number; int() would be slow, or refuse it
    for pattern, base in _BASED.values():
        if pattern.fullmatch(text):
            return int(text[2:], base)
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def read_file(file: Path) -> tuple[Any, dict[KeyPath, int]]:
    """Parses a YAML file; also returns the line number of each value by its path of keys.

    Raises:
      OSError: the file cannot be read.
      YamlError: the file is not UTF-8, is not YAML, is too large, or has a duplicate key.
    """
    with file.open("rb") as stream:
        data = stream.read(_BYTES + 1)
    return read(decoded(data))


def decoded(data: bytes) -> str:
    """Decodes a file's bytes as UTF-8. Raises YamlError unless it is UTF-8."""
    if len(data) > _BYTES:
        raise YamlError(
            f"the text has more than {_BYTES:,} bytes; settings have a few thousand. Check that "
            "this is the right file"
        )
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise YamlError("the text is UTF-16 or UTF-32; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise YamlError(
            f"line {line}: the byte 0x{data[e.start]:02x} is not UTF-8; save the text as UTF-8"
        ) from None


def read(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parses YAML text; also returns the line number of each value by its path of keys."""
    root = _composed(text)
    reader = _Reader()
    return (None if root is None else reader.value(root, ())), reader.lines


def read_value(text: str) -> Any:
    """Parses the YAML value after `key=` on a command line, where comments are refused."""
    root = _composed(text)
    if root is None or root.tag in (_PLAIN, _MERGE):
        return scalar(text.strip())
    quoted = r""""(?:\\.|[^"\\])*"|'(?:''|[^'])*'"""
    if re.search(r"(^|\s)#", re.sub(quoted, "", text)):
        raise YamlError("a # after a space would start a comment; put the text in quotes")
    return _Reader().value(root, ())


def dump(value: Any, **how: Any) -> str:
    """Writes a value as YAML that YAML 1.1 and 1.2 readers understand in the same way."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **how)


class _Loader(yaml.SafeLoader):
    """Builds YAML nodes but does not interpret plain scalars, which `scalar` does later."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.count += 1
        if self.depth > _DEPTH or self.count > _VALUES:
            line = self.peek_event().start_mark.line + 1
            raise YamlError(
                f"line {line}: the text has more than {_VALUES:,} values or {_DEPTH} levels; "
                "settings have far fewer. Check that this is the right file"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return str(super().resolve(kind, value, (False, False)))


class _Dumper(yaml.SafeDumper):
    """Writes YAML, and quotes every string that a YAML 1.1 or 1.2 reader would misread."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (yaml passes it)
        return True

    def represent_str(self, data: str) -> yaml.Node:
        # PyYAML would put a key with these line ends in single quotes, which read as a space.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(f"{_TAG}str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, _pattern in (("int", _INT), ("int", re.compile("0o[0-7]+")), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(
        _TAG + _tag, re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def _composed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Loader)
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise YamlError(f"line {line}: YAML does not allow {e.character!r}; remove it") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        context = f"{e.context}, " if e.context else ""
        raise YamlError(f"{line}not YAML: {context}{e.problem}") from None


class _Reader:
    """Converts YAML nodes to Python values and records their line numbers."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.count = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        line = node.start_mark.line + 1
        self.lines[path] = line
        self.count += 1
        if self.count > _VALUES or len(path) > _DEPTH:
            raise YamlError(
                f"line {line}: the text has more than {_VALUES:,} values or {_DEPTH} levels, with "
                "every alias counted as the values that it stands for; remove aliases"
            )
        if isinstance(node, yaml.MappingNode):
            _check_tag(node, "map")
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            _check_tag(node, "seq")
            return [self.value(each, (*path, i)) for i, each in enumerate(node.value)]
        return _of_scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        merged: list[yaml.Node] = []
        own: list[tuple[Any, yaml.Node]] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(f"line {line}: a key is a list or a mapping; text was expected")
            is_merge = key_node.tag == _MERGE
            key = "<<" if is_merge else _of_scalar(key_node)
            if key in seen:
                raise YamlError(
                    f"lines {seen[key]} and {line}: the key {'.'.join(map(str, (*path, key)))} is "
                    "given twice; keep one of them"
                )
            seen[key] = line
            if is_merge:
                merged = list(self._merged(value_node))
            else:
                own.append((key, value_node))
        found: dict[Any, Any] = {}
        for each in reversed(merged):  # earlier ones take precedence, and own keys over all
            found |= self.value(each, path)
        for key, value_node in own:
            found[key] = self.value(value_node, (*path, key))
            self.lines[(*path, key)] = seen[key]
        self.lines[path] = node.start_mark.line + 1
        return found

    def _merged(self, node: yaml.Node) -> Iterator[yaml.Node]:
        several = isinstance(node, yaml.SequenceNode)
        for each in node.value if several else [node]:
            if not isinstance(each, yaml.MappingNode):
                raise YamlError(
                    f"line {node.start_mark.line + 1}: << must be followed by a mapping, or a list "
                    "of mappings"
                )
            yield each


def _check_tag(node: yaml.Node, *kinds: str) -> None:
    if node.tag not in [_TAG + kind for kind in kinds]:
        raise YamlError(
            f"line {node.start_mark.line + 1}: the tag {node.tag} is not supported; remove it"
        )


def _of_scalar(node: yaml.Node) -> Any:
    if node.tag in (_PLAIN, _MERGE):
        return scalar(node.value)
    _check_tag(node, "str", "int", "float", "bool", "null")
    if node.tag != f"{_TAG}str":
        return scalar(node.value)
    # JSON writes a character above U+FFFF as a pair of escapes.
    try:
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise YamlError(
            f"line {node.start_mark.line + 1}: half of a surrogate pair stands alone; remove it"
        ) from None
