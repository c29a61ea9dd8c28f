"""Ranges of allowed numbers, declared at the setting: `rows: Annotated[int, Range(1)]`.

A range also refuses NaN, infinity, true, false and all texts that it does not list.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from pydantic_core import PydanticCustomError, core_schema

MOST = 2**31 - 1  # the largest 32-bit integer, JAX's default


@dataclass(frozen=True, eq=False)
class Range:
    """A range of allowed numbers, from `low` to `high`.

    Attributes:
        above, below: whether `low` (`high`) itself is excluded.
        whole: allow whole numbers only; 8.0 is one.
        also: allowed numbers outside the range, which have a special meaning.
        words: allowed texts, such as `auto`.
        advice: what to write instead of a number that other programs allow and this one does not.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    also: tuple[float, ...] = ()
    words: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.low == -math.inf and self.high == math.inf:
            return f"a finite {kind[2:]}"
        low, high = (f"{bound:,}" for bound in (self.low, self.high))
        if not self.above and not self.below and math.isfinite(self.low + self.high):
            bounds = f"{low} or {high}" if self._is_pair else f"from {low} to {high}"
            text = f"{kind} {bounds}" if not self._is_pair else bounds
        else:
            parts = []
            if self.low != -math.inf:
                parts.append(f"above {low}" if self.above else f"of at least {low}")
            if self.high != math.inf:
                parts.append(f"below {high}" if self.below else f"at most {high}")
            text = f"{kind} {' and '.join(parts)}"
        others = [*(f"{each:g}" for each in self.also), *(f"`{word}`" for word in self.words)]
        return " or ".join([text, *others])

    @property
    def _is_pair(self) -> bool:
        return self.whole and self.high == self.low + 1

    def problem(self, value: object) -> str | None:
        """Says what was expected instead of the value; None if the value is in the range."""
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if number and (value in self.also or self._holds(value)):
            return None
        if isinstance(value, str) and value in self.words:
            return None
        return f"{self}{f'; {self.advice}' if self.advice else ''}"

    def _holds(self, x: Any) -> bool:
        if not abs(x) <= sys.float_info.max or (self.whole and x != math.floor(x)):
            return False
        low = x > self.low if self.above else x >= self.low
        return low and (x < self.high if self.below else x <= self.high)

    def checked(self, value: Any) -> Any:
        """The value: an int, a float or a word. Raises PydanticCustomError if it is not allowed."""
        if self.problem(value) is not None:
            about = {"range": str(self), "advice": f"; {self.advice}" if self.advice else ""}
            raise PydanticCustomError("range", "{range} was expected{advice}", about)
        return value if isinstance(value, str) else self.converted(value)

    def converted(self, value: Any) -> int | float:
        """A value in the range as an int or a float."""
        return int(value) if self.whole else float(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_before_validator_function(self.checked, handler(source))


def ranges_of(function: Callable[..., Any]) -> Mapping[str, Range]:
    """The ranges declared for a function's parameters or a class's fields, by name."""
    hints = get_type_hints(function, include_extras=True)
    declared = {name: next(_declared(hint), None) for name, hint in hints.items()}
    return {name: found for name, found in declared.items() if found is not None}


def _declared(hint: Any) -> Iterator[Range]:
    """The ranges inside a type hint, such as those in `Count | None` or `list[Count]`."""
    yield from (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range))
    for inner in get_args(hint):
        yield from _declared(inner)


# Types that many settings share.
Count = Annotated[int, Range(1, MOST, whole=True)]
Natural = Annotated[int, Range(0, MOST, whole=True)]  # 0 included
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Axis = Annotated[int, Range(1, MOST, whole=True, also=(-1,))]  # of a mesh; -1: remaining devices
Share = Annotated[float, Range(0, 1, advice="it is a share: write 0.1 for 10 per cent")]
# The evaluation uses the run's seed plus 1; JAX silently drops all but 32 bits of a larger one.
Seed = Annotated[int, Range(0, MOST, whole=True)]
