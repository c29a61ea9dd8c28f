"""Holds a model's answers: texts for people and rankers, token ids for training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, overload

from selm_jax.preferences.candidates import Candidate
from selm_jax.preferences.examples import Example, Ids
from selm_jax.text.conversations import Prompt

if TYPE_CHECKING:
    import pandas as pd


class Writer(Protocol):
    """The methods of `Model` that `Answers` and `Pairs` need, as a protocol."""

    @property
    def name(self) -> str: ...
    @property
    def updates(self) -> int: ...
    @property
    def tokenizer(self) -> str: ...
    def _scores_of(
        self, examples: Sequence[Example], tokenizer: str
    ) -> list[tuple[float, ...]]: ...


@dataclasses.dataclass(frozen=True, repr=False)
class Answers(Sequence[Sequence[Candidate]]):
    """The answers to a list of prompts: `answers[i][j].text` is the j-th answer to prompt i.

    The greedy answer comes first, then the samples. `Model.generate` returns them.

    Attributes:
      prompts: the conversations that were answered.
      prompt_ids: their token ids, including the header of the answer.
      candidates: the answers to each prompt, with `source` ("greedy" or "sample"), `text`,
        `token_ids` and `finish` ("stop", or "length" if the answer was cut off).
      model: the model that answered.
      updates: the number of updates that the model had at that time.
    """

    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[Ids, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    model: Writer
    updates: int

    def __len__(self) -> int:
        return len(self.candidates)

    @overload
    def __getitem__(self, index: int) -> tuple[Candidate, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Answers: ...
    def __getitem__(self, index: int | slice) -> tuple[Candidate, ...] | Answers:
        if not isinstance(index, slice):
            return self.candidates[index]
        part = {
            name: getattr(self, name)[index] for name in ("prompts", "prompt_ids", "candidates")
        }
        return dataclasses.replace(self, **part)

    @property
    def texts(self) -> list[list[str]]:
        """The answers' texts: a list for each prompt."""
        return [[each.text for each in of_prompt] for of_prompt in self.candidates]

    def to_pandas(self) -> pd.DataFrame:
        """Returns a DataFrame with one row per answer, such as its prompt, text and tokens."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": prompt.messages[-1].content,
                "source": each.source,
                "sample": each.sample,
                "text": each.text,
                "finish": each.finish,
                "tokens": len(each.token_ids or ()),
            }
            for prompt, of_prompt in zip(self.prompts, self.candidates, strict=True)
            for each in of_prompt
        )

    def __repr__(self) -> str:
        count = sum(map(len, self.candidates))
        lines = [f"{count} answers of {self.model.name} to {len(self)} prompts"]
        for prompt, of_prompt in list(zip(self.prompts, self.candidates, strict=True))[:4]:
            lines += [f"  {prompt.messages[-1].content!r}"]
            lines += [f"    {each.source:<7} {each.text!r}" for each in of_prompt]
        return "\n".join(lines + ["  ..."] * (len(self) > 4))
