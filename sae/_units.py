"""Sizes and durations as people write them, and seconds that a device took."""

from __future__ import annotations

import time

import torch

GIB = 2**30


def size(n: float) -> str:
    """`40 MiB`, `1.50 GiB`."""
    return f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `4.2 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def seconds_of(device: torch.device) -> float:
    """A clock that is read once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
