"""Jobs of several processes that are killed, stopped and signalled: none hangs, none is left, one line says why.

What torchrun ends by itself was measured with workers that only exchange numbers (2.15, one machine of two cores):

| lost | torchrun | altopt |
|---|---|---|
| a rank, SIGKILL | ends the others in 0.3 s | - |
| its own launcher, SIGTERM | passes it on | - |
| its own launcher, SIGKILL | nothing in 75 s | 1 s, and 5 of grace |
| a rank, SIGSTOP | not tried by itself | 30 s, and 5 of grace; torchrun kills the stopped one 30 s later |
| a rank of another machine, while rank 0 works alone | nothing in 75 s | not tried |
| another machine falls silent | nothing in 75 s | 30 s, and 5 of grace |
"""

import json
import os
import signal
import time

import pytest
from rank_runs import free_port, rank_of, ranks_of, start, start_agent, works

from cache.files import sha256_file
from stages.shared.step import file_name

LONG = ("stage", "1", "--run", "tiny", "--force", "--set", "train_rpn.iterations=60", "--snapshot-seconds", "0",
        "--log-every", "1")
ENDLESS = (*LONG, "--set", "train_rpn.iterations=1000000", "--snapshot-seconds", "1000")


def wait_for_iteration(folder, iteration, launcher):
    """Return once the log tells of an iteration of the training that has just been started."""
    log = folder / "log.jsonl"
    began = log.read_text().count("\n")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and launcher.poll() is None:
        events = [json.loads(line) for line in log.read_text().splitlines()[began:]]
        if any(event["event"] == "progress" and event["iteration"] >= iteration for event in events):
            return
        time.sleep(0.02)
    raise AssertionError(launcher.communicate())


@pytest.fixture
def begin(copied):
    """Start jobs in the folder of a finished run; what a failed test leaves of them is killed."""
    begun = []

    def begin(count, command=ENDLESS, iteration=3):
        launcher = start(copied.parents[1], count, *command)
        begun.append(launcher.pid)
        wait_for_iteration(copied, iteration, launcher)
        begun.extend(ranks_of(launcher))
        return launcher, ranks_of(launcher)

    yield begin
    for process in filter(works, begun):
        os.kill(process, signal.SIGKILL)


def ended(launcher, processes, within, code):
    """Wait for the end of a job, see that nothing is left of it, and return the lines that altopt said."""
    _, said = launcher.communicate(timeout=within)
    deadline = time.monotonic() + 1
    while any(map(works, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(works, processes))
    assert launcher.returncode == code
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("altopt: ")]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.torture), 1])
def test_torchrun_ends_a_job_whose_rank_was_killed(begin, rank):
    launcher, processes = begin(2)
    os.kill(processes[rank], signal.SIGKILL)
    assert ended(launcher, processes, 60, 6) == [
        f"altopt: process {rank + 1} of 2 ended by SIGKILL: run the same command again to go on"]


def test_ranks_end_when_the_launcher_was_killed(begin):
    launcher, processes = begin(2)
    launcher.kill()
    said = ended(launcher, processes, 60, -signal.SIGKILL)
    assert len(said) == 1
    assert said[0].endswith("run the same command again to go on")


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all(begin, number):
    launcher, processes = begin(2)
    launcher.send_signal(number)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert ended(launcher, processes, 60, 128 + number) == [
        f"altopt: stopped by {name}; run the same command again to go on"]


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [2, 4, 8])
def test_a_signal_before_the_work_begins(copied, number, seconds):
    launcher = start(copied.parents[1], 2, *ENDLESS)
    while len(processes := ranks_of(launcher)) < 2:
        time.sleep(0.05)
    time.sleep(seconds)
    launcher.send_signal(number)
    ended(launcher, processes, 60, 128 + number)


@pytest.mark.torture
@pytest.mark.parametrize(("count", "rank"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_a_stopped_rank_is_missed(begin, count, rank):
    launcher, processes = begin(count)
    os.kill(processes[rank], signal.SIGSTOP)
    said = ended(launcher, processes, 100, 6)
    assert said == [f"altopt: process {rank + 1} of {count} gave no sign of life for 30 s (it was stopped, or its "
                    "machine is gone): run the same command again to go on"]


@pytest.mark.torture
def test_a_job_that_is_stopped_as_a_whole_goes_on(begin):
    launcher, processes = begin(2, LONG)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in (launcher.pid, *processes):
            os.kill(process, number)
        time.sleep(40 if number == signal.SIGSTOP else 0)
    assert ended(launcher, processes, 60, 0) == []


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("machine", [0, 1])
def test_a_machine_that_falls_silent_is_missed(copied, machine, number):
    """Two agents stand for two machines; one of them is lost with its rank. Either may keep the store."""
    port = free_port()
    agents = {}
    begun = [start_agent(copied.parents[1], port, *ENDLESS) for _ in range(2)]
    wait_for_iteration(copied, 3, begun[0])
    for agent in begun:
        process, = ranks_of(agent)
        agents[rank_of(process)] = agent, process
    lost, left = agents[machine], agents[1 - machine]
    try:
        for process in (lost[0].pid, lost[1]):
            os.kill(process, number)
        _, said = left[0].communicate(timeout=90)
        assert not works(left[1])
        lines = [line for line in said.splitlines() if line.startswith("altopt: ")]
        if "RendezvousConnectionError" in said:  # the lost agent kept the store, so torchrun missed it, and says so
            assert not lines
        else:
            assert len(lines) == 1
            assert lines[0].endswith("run the same command again to go on")
    finally:
        for agent, process in agents.values():
            for each in filter(works, (agent.pid, process)):
                os.kill(each, signal.SIGKILL)
            agent.communicate()


@pytest.mark.torture
@pytest.mark.parametrize("count", [2, 3])
def test_a_job_killed_and_then_terminated_goes_on_to_the_same_bytes(copied, begin, count):
    """In batches of as many images, of which none has all: a sum of three has an order."""
    command = (*LONG, "--set", f"train_rpn.images_per_batch={count}")
    uninterrupted = start(copied.parents[1], count, *command)
    uninterrupted.communicate(timeout=300)
    expected = sha256_file(copied / file_name("M1"))
    for number, iteration, code in ((signal.SIGKILL, 20, 6), (signal.SIGTERM, 40, 143)):
        launcher, processes = begin(count, command, iteration)
        os.kill(processes[1], number)
        said = ended(launcher, processes, 60, code)
    assert said == ["altopt: stopped by SIGTERM; run the same command again to go on"]
    last = start(copied.parents[1], count, *command)
    _, text = last.communicate(timeout=300)
    assert "M1: goes on after iteration" in text
    assert (uninterrupted.returncode, last.returncode) == (0, 0)
    assert sha256_file(copied / file_name("M1")) == expected
