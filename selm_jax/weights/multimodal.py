"""The tensors of a multi-modal checkpoint: those of its text model, and those to leave aside.

The published files name them `language_model.model.layers...`; the model in transformers, and files
that some versions write, `model.language_model.layers...`. Everything else reads and writes the
names that the text model has alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selm_jax.models.multimodal import is_multimodal
from selm_jax.shell.json_file import read_object
from selm_jax.weights.files import Checkpoint, Stored, WeightsError, open_checkpoint
from selm_jax.weights.mxfp4 import in_full

_TEXT = {  # the beginning of a stored name, and of the text model's own
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
_ASIDE = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.",
    "model.multi_modal_projector.", "model.embed_vision.",
)  # fmt: skip


def is_in(folder: Path) -> bool:
    """Returns whether the model in a folder is multi-modal, so that only its text model is used."""
    file = folder / "config.json"
    return file.exists() and is_multimodal(read_object(file))


def open_text(folder: Path) -> Checkpoint:
    """Opens a folder's checkpoint; of a multi-modal one, the text model under its own names.

    Tensors of images are left out. Unknown names stay as they are. Tensors in mxfp4 are read as
    bfloat16.

    Raises:
      WeightsError: as for `open_checkpoint` and `mxfp4.in_full`, or two stored tensors have the
        same meaning.
    """
    checkpoint = open_checkpoint(folder)
    if not is_in(folder):
        return in_full(checkpoint)
    kept = {name: _own(name) for name in checkpoint.tensors if not name.startswith(_ASIDE)}
    if len(set(kept.values())) < len(kept):
        raise WeightsError(
            f"{folder}: the text model's tensors are stored twice, as language_model.model... and "
            "as model.language_model.... Get the files again"
        )
    return in_full(checkpoint.renamed(kept))


def _own(name: str) -> str:
    for stored, own in _TEXT.items():
        if name.startswith(stored):
            return own + name.removeprefix(stored)
    return name


class Around(NamedTuple):
    """Holds what a multi-modal checkpoint has around its text model, for an export of the whole.

    Attributes:
      checkpoint: the whole checkpoint.
      stored: the stored name of each of the text model's tensors.
      aside: shape and dtype of the other tensors.
    """

    checkpoint: Checkpoint
    stored: dict[str, str]
    aside: dict[str, Stored]

    def tensors(self, wanted: Container[str]) -> Iterator[tuple[str, np.ndarray | None]]:
        """Yields the bytes of each tensor beside the text model; None for one not `wanted`."""
        return ((n, self.checkpoint.bytes_of(n) if n in wanted else None) for n in self.aside)


def around(folder: Path) -> Around:
    """Reads what the multi-modal checkpoint in `folder` has around its text model."""
    checkpoint = open_checkpoint(folder)
    aside = {n: t for n, t in checkpoint.tensors.items() if n.startswith(_ASIDE)}
    stored = {_own(name): name for name in checkpoint.tensors if name not in aside}
    return Around(checkpoint, stored, aside)
