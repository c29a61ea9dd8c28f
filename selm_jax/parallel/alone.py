"""Finds the devices on which one of several processes can run a program without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def own_devices(devices: Sequence[Any] | None = None) -> list[Any]:
    """The devices on which one process can run a program by itself: usually all of its own.

    In a v5e slice of more than 16 chips it is one device: there a program must run on one chip or
    on all chips of the slice. For four, the compiler fails with "On platforms with limited ICI
    routing device assignment should include all slice devices" (seen for 4x8 and larger, not for
    4x4, v5p or v6e).

    Args:
      devices: the devices of all processes. If given, the process of the first device is meant.
    """
    index = jax.process_index() if devices is None else devices[0].process_index
    devices = jax.devices() if devices is None else devices
    own = [device for device in devices if device.process_index == index]
    limited = own[0].device_kind == "TPU v5 lite" and len(devices) > 16
    return own[:1] if limited else own
