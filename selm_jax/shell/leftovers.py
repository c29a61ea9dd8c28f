"""Deletes what killed processes left in the cache."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

INCOMING = ".incoming-"  # the names of temporary folders in the cache begin with this
_STALE_SECONDS = 24 * 3600


def sweep(cache: Path) -> None:
    """Removes old temporary folders of killed processes; newer ones may still be in use."""
    for left in cache.glob(f"{INCOMING}*"):
        with contextlib.suppress(FileNotFoundError):  # another process is sweeping too
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left)
