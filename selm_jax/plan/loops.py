"""Finds collectives inside the loops of a compiled program, from its optimized HLO text.

A collective in a loop runs in every turn. That is as it should be where each turn needs other
arrays: with fsdp, the loop over layers gathers the weights of one layer per turn. It is wasteful
where every turn gathers the same array, such as the unembedding in a loop over chunks of tokens.
The compiler does not move such a gather out of the loop, because the result is larger than its
input.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

LEAST = 4 * 2**20  # smaller arrays take little time, so their collectives are not counted

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"(?:{_KINDS})(?:-start)?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
# The opcode is the first lower-case word with a parenthesis: layouts such as T(8,128) are upper.
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\(([^)]*)\)(.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+)(\d+)?\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Moved:
    """A collective in a loop.

    Attributes:
      kind: the operation, such as all-gather.
      array: dtype and shape of its result, such as bf16[128256,4096].
      bytes: the size of the result on one device.
      same: whether every turn of the loop does it with the same input.
      source: where it comes from in the traced program.
    """

    kind: str
    array: str
    bytes: int
    same: bool
    source: str


def in_loops(hlo: str, least: int = LEAST) -> tuple[Moved, ...]:
    """The collectives in loops whose result has at least `least` bytes on one device."""
    program = {name: list(_instructions(text)) for name, text in _COMPUTATION.findall(hlo)}
    bodies = {
        name
        for instructions in program.values()
        for each in instructions
        if each.opcode == "while"
        for name in re.findall(r"\bbody=%?([\w.\-]+)", each.rest)
    }
    found = [moved for body in sorted(bodies) for moved in _of_body(program, program[body])]
    return tuple(each for each in found if each.bytes >= least)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    root: bool
    name: str
    type: str
    opcode: str
    operands: Sequence[str]
    rest: str

    @property
    def called(self) -> list[str]:
        return _CALLED.findall(self.rest)


def _instructions(text: str) -> Iterator[_Instruction]:
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            root, name, kind, opcode, operands, rest = found.groups()
            names = re.findall(r"%([\w.\-]+)", operands)
            yield _Instruction(bool(root), name, kind, opcode, names, rest)


def _of_body(
    program: Mapping[str, Sequence[_Instruction]], body: Sequence[_Instruction]
) -> Iterator[Moved]:
    """The collectives of a loop's body, without those of loops inside of it."""
    changes = _changing(body)
    for each in body:
        if each.opcode == "while":
            continue
        same = not any(changes[name] for name in each.operands)
        for done in _collectives(program, each):
            array, size = _largest(done.type)
            source = re.search(r'op_name="([^"]*)"', done.rest + each.rest)
            yield Moved(
                done.opcode.removesuffix("-start"), array, size, same, source[1] if source else ""
            )


def _collectives(
    program: Mapping[str, Sequence[_Instruction]], each: _Instruction
) -> Iterator[_Instruction]:
    """The collectives that an instruction is, or that the computations it calls contain."""
    if _COLLECTIVE.fullmatch(each.opcode):
        yield each
        return
    for name in each.called:
        for inner in program.get(name, ()):
            if inner.opcode != "while":
                yield from _collectives(program, inner)


def _changing(body: Sequence[_Instruction]) -> dict[str, bool]:
    """Returns whether the result of each instruction of a loop's body may differ between turns.

    What does not change is what the loop hands on as it is, and what is computed from that alone.
    """
    by_name = {each.name: each for each in body}
    root = next(each for each in body if each.root)
    handed_on = root.operands if root.opcode == "tuple" else ()
    kept = {i for i, name in enumerate(handed_on) if _element(by_name, name) == i}
    changes: dict[str, bool] = {}
    for each in body:  # in an order in which operands come first
        if each.opcode == "parameter":
            changes[each.name] = True
        elif (i := _element(by_name, each.name)) is not None:
            changes[each.name] = i not in kept
        else:
            changes[each.name] = any(changes[name] for name in each.operands)
    return changes


def _element(by_name: Mapping[str, _Instruction], name: str) -> int | None:
    """Which element of the loop's state an instruction is, if it is one."""
    each = by_name[name]
    while each.opcode in ("copy", "bitcast"):
        each = by_name[each.operands[0]]
    if each.opcode != "get-tuple-element":
        return None
    if by_name[each.operands[0]].opcode != "parameter":
        return None
    index = re.search(r"index=(\d+)", each.rest)
    return int(index[1]) if index else None


def _largest(type_: str) -> tuple[str, int]:
    """The largest array of a type, which may be a tuple, and its size in bytes."""
    sizes = []
    for letters, bits, shape in _ARRAY.findall(type_):
        count = math.prod(int(n) for n in shape.split(",") if n)
        sizes.append((count * max(int(bits or 8) // 8, 1), f"{letters}{bits}[{shape}]"))
    size, array = max(sizes, default=(0, type_))
    return array, size
