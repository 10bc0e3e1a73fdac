"""Threads of our own leave torch's alone."""

import threading

import pytest
import torch

from altopt.batches.reading import Prefetcher
from altopt.machine.threads import single_threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_torch_computes_on_one_thread_in_each_and_elsewhere_as_before(three_threads):
    together = threading.Barrier(4)

    def count(_):
        together.wait(timeout=30)  # each of the four takes one
        return threading.current_thread().name, torch.get_num_threads()

    with single_threads(4, "mine") as pool:
        counted = dict(pool.map(count, range(4)))
    assert counted == {f"mine_{k}": 1 for k in range(4)}
    assert torch.get_num_threads() == of_a_new_thread() == 3


def test_a_thread_that_cannot_start_keeps_none_waiting(monkeypatch):
    start, others = threading.Thread.start, set(threading.enumerate())

    def one_alone(thread):
        if set(threading.enumerate()) - others:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one_alone)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        single_threads(3, "mine")
    for thread in set(threading.enumerate()) - others:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_readers_are_such_threads(three_threads):
    with Prefetcher(lambda _: torch.get_num_threads(), range(8), workers=2) as ahead:
        assert list(ahead) == [1] * 8
    assert torch.get_num_threads() == of_a_new_thread() == 3
