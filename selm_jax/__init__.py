"""Self-Exploring Language Models in JAX.

    import selm_jax as selm

    model = selm.load("HuggingFaceTB/SmolLM2-135M-Instruct")

`__all__` lists the public names; `docs/api.md` describes them. They are imported when they are
first used, so that `import selm_jax` is quick and loads no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selm_jax.api.answers import Answers
    from selm_jax.api.losses import loss
    from selm_jax.api.model import Model, load
    from selm_jax.api.pairs import Pairs, pairs
    from selm_jax.api.ranking import Ranker, ranker
    from selm_jax.api.runs import RunFolder, read, run
    from selm_jax.api.trainer import Trainer
    from selm_jax.objectives.losses import Logps, Objective

__version__ = "0.1.0"

__all__ = [
    "Answers",
    "Logps",
    "Model",
    "Objective",
    "Pairs",
    "Ranker",
    "RunFolder",
    "Trainer",
    "load",
    "loss",
    "pairs",
    "ranker",
    "read",
    "run",
]

_WHERE = {
    "Answers": "api.answers:Answers",
    "Logps": "objectives.losses:Logps",
    "Model": "api.model:Model",
    "Objective": "objectives.losses:Objective",
    "Pairs": "api.pairs:Pairs",
    "Ranker": "api.ranking:Ranker",
    "RunFolder": "api.runs:RunFolder",
    "Trainer": "api.trainer:Trainer",
    "load": "api.model:load",
    "loss": "api.losses:loss",
    "pairs": "api.pairs:pairs",
    "ranker": "api.ranking:ranker",
    "read": "api.runs:read",
    "run": "run",  # the folder of that name, which can be called
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
