"""Pages of 2 MB in place of 4 kB for large buffers, which malloc asks the kernel for only if told before it starts.

A step on a CPU takes its working memory anew each time, and the kernel clears it page by page as it is first touched.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLES, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # "Tunables" in the GNU C Library's manual
_SINCE = (2, 35)
_ON_REQUEST = "[madvise]"  # how most distributions ship the kernel; "always" needs no request, "never" hears none
_STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process must find in its environment at its start to get them; {} where that says so already or cannot."""
    given = environment.get(_TUNABLES, "")
    if _TUNABLE in given or not _on_request() or _glibc() < _SINCE:
        return {}
    return {_TUNABLES: ":".join(filter(None, (given, f"{_TUNABLE}=1")))}


def restart_with_huge_pages() -> None:
    """Start this command once more, as the same process, with `settings`; returns where nothing is to be gained.

    To be called before anything else is imported: what was done so far is done again (15 ms).
    """
    wanted = settings()
    if wanted and not _debugged() and sys.executable:
        try:
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
        except OSError:  # goes on without
            return


def _debugged() -> bool:
    """Whether a debugger follows this process, which would lose it."""
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12 and newer
    return sys.gettrace() is not None or bool(monitoring and monitoring.get_tool(monitoring.DEBUGGER_ID))


def _glibc() -> tuple[int, ...]:
    """The version of the GNU C Library that this process runs on; () on another."""
    name, version = platform.libc_ver()
    return tuple(map(int, version.split(".")[:2])) if name == "glibc" else ()


def _on_request() -> bool:
    try:
        return _ON_REQUEST in _STATE.read_text()
    except OSError:
        return False
