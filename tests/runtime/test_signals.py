"""The first signal asks, the second ends."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from itune.runtime.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_only_asks(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert signal.getsignal(number) is before


def test_second_signal_leaves_at_once():
    code = ("from itune.runtime.signals import StopRequest; import os, signal, time\n"
            "with StopRequest() as stop:\n"
            "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == "itune: second SIGTERM: leaving at once\n"


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def body():
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]
