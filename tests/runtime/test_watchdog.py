"""A step that does not end is reported with all stacks, and the process leaves; time is injected."""

import subprocess
import sys
import threading

from itune.runtime.watchdog import Watchdog


def test_leaves_only_after_the_time_and_never_while_paused(capfd):
    now, left = [0.0], []
    dog = Watchdog(10, lambda seconds: f"hung for {seconds:.0f} s", clock=lambda: now[0], leave=left.append)
    dog.beat()
    now[0] = 9.9
    assert not dog.look()
    with dog.paused():
        now[0] = 1000.0
        assert not dog.look()
    assert not dog.look()
    now[0] = 1010.0
    assert dog.look() and left == [1]
    err = capfd.readouterr().err
    assert "itune: hung for 10 s" in err and "test_leaves_only_after" in err  # the stacks of all threads


def test_hung_process_leaves_with_exit_code_1_and_all_stacks():
    code = ("import time\nfrom itune.runtime.watchdog import Watchdog\n"
            "def hang_here():\n    time.sleep(600)\n"
            "with Watchdog(0.2, lambda seconds: 'step 7 has not ended: a.jsonl:3'):\n    hang_here()\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "itune: step 7 has not ended: a.jsonl:3" in done.stderr and "in hang_here" in done.stderr


def test_zero_seconds_is_off():
    with Watchdog(0, lambda seconds: "") as dog:
        assert dog._thread is None


def test_a_time_beyond_any_clock_is_no_failure(monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr("itune.runtime.watchdog._PAUSE", 0.01)
    with Watchdog(1e300, lambda seconds: "") as dog:
        dog._thread.join(0.2)
        assert dog._thread.is_alive()
    assert not failed
