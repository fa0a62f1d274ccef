"""Orbax raises when its first writer fails; the others may still be writing when the folder is removed."""

from __future__ import annotations

import threading
import time

from itune.checkpoint.commit import remove_while_written


def test_a_late_writer_leaves_nothing(tmp_path):
    folder = tmp_path / ".tmp-8"

    def write():
        for n in range(15):  # 0.3 seconds, each makes the folder anew when it is gone
            (folder / "arrays").mkdir(parents=True, exist_ok=True)
            (folder / "arrays" / str(n)).write_text("x")
            time.sleep(0.02)

    def writer():
        for _ in range(3):  # a removal between mkdir and write is what a real writer meets too
            try:
                return write()
            except OSError:
                continue

    thread = threading.Thread(target=writer)
    thread.start()
    remove_while_written(folder)
    thread.join()
    assert not folder.exists()


def test_a_folder_that_is_not_there(tmp_path):
    remove_while_written(tmp_path / "none", quiet=0.01)
