"""Memory that a CPU step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8  # from glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask malloc for one heap that never shrinks, for this process; returns whether it took it.

    By default glibc gives a step's large buffers back to the system and takes new ones, zeroed page by page, in every
    step: with a model of a few MB on a CPU that is a quarter of all time. Costs some memory at the peak, so it is for
    small models; call it before the first computation. Does nothing outside Linux with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1))
    taken = [libc.mallopt(name, value) for name, value in settings]
    return taken == [1] * len(settings)
