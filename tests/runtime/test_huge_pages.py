"""The command starts itself with malloc told to use huge pages; what runs then has them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import itune
from itune.runtime import huge_pages

BASE = Path(itune.__file__).parent / "demo" / "assets" / "base"
TUNABLE = b"glibc.malloc.hugetlb=1"


def untold():
    return {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}


needs_huge_pages = pytest.mark.skipif(
    not huge_pages.settings(untold()), reason="this kernel or C library gives no huge pages on request"
)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A machine that gives huge pages to whoever asks."""
    state = tmp_path / "enabled"
    state.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_STATE", state)
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 35))
    return state


def test_what_the_environment_already_says_stays(asked):
    assert huge_pages.settings({}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    other = "glibc.malloc.arena_max=2"
    assert huge_pages.settings({"GLIBC_TUNABLES": other}) == {"GLIBC_TUNABLES": f"{other}:glibc.malloc.hugetlb=1"}
    for given in ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=1", f"{other}:glibc.malloc.hugetlb=2"):
        assert huge_pages.settings({"GLIBC_TUNABLES": given}) == {}


@pytest.mark.parametrize("state", ["[always] madvise never", "always madvise [never]", None])
def test_a_kernel_that_is_not_to_be_asked_is_not_asked(asked, state):
    asked.unlink() if state is None else asked.write_text(state)
    assert huge_pages.settings({}) == {}


@pytest.mark.parametrize("version", [(), (2, 31)])
def test_another_c_library_is_not_told(asked, monkeypatch, version):
    monkeypatch.setattr(huge_pages, "_glibc", lambda: version)
    assert huge_pages.settings({}) == {}


def test_a_debugger_keeps_its_process(asked, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("it was started once more"))
    with monkeypatch.context() as traced:
        traced.setattr(sys, "gettrace", lambda: print)
        huge_pages.restart_with_huge_pages()
    if not hasattr(sys, "monitoring"):
        return
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # what measures coverage may be there
    sys.monitoring.use_tool_id(sys.monitoring.DEBUGGER_ID, "a debugger")
    try:
        huge_pages.restart_with_huge_pages()
    finally:
        sys.monitoring.free_tool_id(sys.monitoring.DEBUGGER_ID)


def test_a_start_that_fails_goes_on_without(asked, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    huge_pages.restart_with_huge_pages()


@needs_huge_pages
@pytest.mark.parametrize("options", [(), ("-X", "utf8", "-u")])
def test_the_command_goes_on_as_the_same_process_with_the_same_words(options):
    words = [*options, "-m", "itune", "chat", "--model", str(BASE), "--max-new-tokens", "2"]
    with subprocess.Popen([sys.executable, *words], env=untold(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        own, until = Path("/proc") / str(process.pid), time.monotonic() + 60
        while TUNABLE not in (own / "environ").read_bytes() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        assert TUNABLE in (own / "environ").read_bytes()
        assert (own / "cmdline").read_bytes().split(b"\0")[1:-1] == [word.encode() for word in words]
        process.kill()


@needs_huge_pages
def test_a_large_buffer_then_lies_in_huge_pages():
    code = """
import re
held = b"x" * (64 << 20)  # by malloc: numpy asks for huge pages itself
print(sum(map(int, re.findall(r"AnonHugePages: +(\\d+) kB", open("/proc/self/smaps").read()))))
"""

    def huge_kb(environment):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert huge_kb({**untold(), **huge_pages.settings(untold())}) > huge_kb(untold()) + (32 << 10)
