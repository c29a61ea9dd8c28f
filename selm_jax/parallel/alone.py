"""What one process of several can run a program on without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def own_devices(devices: Sequence[Any] | None = None) -> list[Any]:
    """The devices on which one process of several can run a program by itself: its own ones.

    Of a v5e slice it is one: there a program runs on one chip or on the whole slice, and for any
    other number the compiler refuses ("On platforms with limited ICI routing device assignment
    should include all slice devices"; v5p and v6e have no such bound).

    Args:
      devices: of all processes; if given, the process of the first is meant.
    """
    index = jax.process_index() if devices is None else devices[0].process_index
    devices = jax.devices() if devices is None else devices
    own = [device for device in devices if device.process_index == index]
    whole = len(own) == len(devices)
    return own if whole or own[0].device_kind != "TPU v5 lite" else own[:1]
