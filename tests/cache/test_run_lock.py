import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from altopt.errors import ArtifactError, BusyError
from cache.lock import LOCK_NAME, run_lock

ROOT = Path(__file__).parents[2]
HEAD = """
import os, sys, pathlib, time
from cache.lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
"""
HOLD = """
    print("held", flush=True)
    time.sleep(60)
"""
HOLD_AND_FORK = """
    if not os.fork():
        print(os.getpid(), flush=True)  # by the worker itself: its end of the fork is then done
    time.sleep(60)
"""
OUTLIVE_A_WORKER = """
    worker = os.fork()
    if not worker:
        sys.exit()
    print(os.waitpid(worker, 0)[1], flush=True)
    time.sleep(60)
"""


def start(folder, body):
    command = [sys.executable, "-c", HEAD + body, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    with start(tmp_path, HOLD) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_process_is_told_who_holds_it(tmp_path, holder):
    with pytest.raises(BusyError) as caught, run_lock(tmp_path):
        pytest.fail("the lock did not hold")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} is busy: process {holder.pid} on ")
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", message)
    assert "wait until it has finished" in message
    assert "\n" not in message
    assert caught.value.exit_code == 75


def test_lock_ends_with_a_killed_process(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with run_lock(tmp_path):
        pass


def test_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    with start(tmp_path, HOLD_AND_FORK) as process:
        worker = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            os.kill(worker, 0)
            with run_lock(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_worker_that_ends_does_not_free_the_lock(tmp_path):
    with start(tmp_path, OUTLIVE_A_WORKER) as process:
        assert process.stdout.readline() == "0\n"
        with pytest.raises(BusyError, match=f"process {process.pid} "), run_lock(tmp_path):
            pass
        process.kill()


def test_same_process_cannot_hold_it_twice(tmp_path):
    with run_lock(tmp_path), pytest.raises(BusyError, match=f"process {os.getpid()} "), run_lock(tmp_path):
        pass


def test_lock_is_free_after_the_block_and_after_an_error(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path):
        pass


def test_busy_folder_is_noticed_at_once_and_other_folders_are_free(tmp_path, holder):
    begin = time.monotonic()
    with pytest.raises(BusyError), run_lock(tmp_path):
        pass
    with run_lock(tmp_path / "new" / "other"):
        pass
    assert time.monotonic() - begin < 5


def test_holder_without_a_name(tmp_path, holder):
    (tmp_path / LOCK_NAME).write_text("{")
    with pytest.raises(BusyError, match="another process holds it: wait"), run_lock(tmp_path):
        pass


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file cannot be made a folder: File exists"), run_lock(tmp_path / "file"):
        pass
