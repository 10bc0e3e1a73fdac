"""The order of batches, and reading ahead."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from altopt.batches.reading import BatchOrder, Entry, Prefetcher


def entries(landscape: int, portrait: int) -> list[Entry]:
    """Return entries of both kinds, mixed."""
    made = [Entry(f"l{k}", False, True) for k in range(landscape)] + [
        Entry(f"p{k}", True, False) for k in range(portrait)]
    return made[::2] + made[1::2]


def epoch(order: BatchOrder, number: int = 0) -> list[list[Entry]]:
    return [order[number * order.batches_per_epoch + k] for k in range(order.batches_per_epoch)]


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize(("landscape", "portrait"), [(7, 5), (8, 4), (1, 0), (0, 3), (1, 1), (13, 0), (5, 2)])
def test_each_entry_comes_once_in_an_epoch(landscape, portrait, batch):
    given = entries(landscape, portrait)
    order = BatchOrder(given, batch, 3, "stage")
    for number in range(3):
        batches = epoch(order, number)
        assert sorted(e.id for one in batches for e in one) == sorted(e.id for e in given)
        assert len(batches) == -(-len(given) // batch)
        assert sorted(map(len, batches))[1:] == [batch] * (len(batches) - 1)  # one may be short
        mixed = [one for one in batches if len({e.landscape for e in one}) > 1]
        assert len(mixed) <= 1


def test_only_what_is_left_over_is_mixed():
    for number in range(20):
        batches = epoch(BatchOrder(entries(7, 5), 2, 3), number)
        assert sum(len({e.landscape for e in one}) > 1 for one in batches) == 1
        batches = epoch(BatchOrder(entries(8, 4), 2, 3), number)
        assert all(len({e.landscape for e in one}) == 1 for one in batches)


def test_a_batch_larger_than_the_data_set_holds_it_once():
    order = BatchOrder(entries(3, 2), 100, 3)
    assert order.batches_per_epoch == 1
    assert len(order[0]) == len(order[17]) == 5


def test_the_order_is_a_function_of_the_key_alone():
    given = entries(30, 21)
    order, again, other = BatchOrder(given, 4, 3, "rpn"), BatchOrder(given, 4, 3, "rpn"), BatchOrder(given, 4, 4, "rpn")
    forward = [order[t] for t in range(60)]
    backward = [again[t] for t in reversed(range(60))][::-1]  # as after a resumption, or from many threads
    assert forward == backward
    assert forward != [other[t] for t in range(60)]


def test_epochs_differ():
    order = BatchOrder(entries(20, 0), 1, 3)
    assert len({tuple(e.id for one in epoch(order, number) for e in one) for number in range(5)}) == 5


def test_leftovers_are_other_entries_each_time():
    """Otherwise the same images would always meet in the mixed or the short batch."""
    order = BatchOrder(entries(9, 0), 2, 3)
    short = {one[0].id for number in range(40) for one in epoch(order, number) if len(one) == 1}
    assert len(short) > 5


def test_the_order_can_be_asked_from_threads():
    order = BatchOrder(entries(15, 6), 2, 3)
    expected = [BatchOrder(entries(15, 6), 2, 3)[t] for t in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(order.__getitem__, range(200))) == expected


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    def slow_first(k: int) -> int:
        time.sleep(0.02 if k == 0 else 0)
        return k * k

    with Prefetcher(slow_first, range(20), workers) as ahead:
        assert list(ahead) == [k * k for k in range(20)]
        with pytest.raises(StopIteration):
            next(ahead)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_do(workers):
    with Prefetcher(str, [], workers) as ahead:
        assert list(ahead) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_exception_arrives_in_its_turn_and_as_it_is(workers):
    def broken_at_five(k: int) -> int:
        if k == 5:
            raise KeyError("five")
        return k

    with Prefetcher(broken_at_five, range(9), workers) as ahead:
        assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(KeyError, match="five"):
            next(ahead)


def test_it_reads_ahead_but_not_without_end():
    made: list[int] = []
    with Prefetcher(made.append, range(10_000), 2) as ahead:
        next(ahead)
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert sorted(made) == [0, 1, 2, 3, 4]


def test_work_is_done_by_threads_or_in_place():
    with Prefetcher(lambda k: threading.current_thread().name, range(3), 2) as ahead:
        assert all(name.startswith("altopt-reader") for name in ahead)
    with Prefetcher(lambda k: threading.current_thread().name, range(3), 0) as ahead:
        assert set(ahead) == {threading.current_thread().name}


@pytest.mark.parametrize("workers", [0, 3])
def test_closing_drops_the_rest_and_leaves_no_thread(workers):
    made: list[int] = []
    before = threading.active_count()

    def interrupted() -> None:
        with Prefetcher(made.append, range(1000), workers) as ahead:
            next(ahead)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    count = len(made)
    assert threading.active_count() == before
    time.sleep(0.01)
    assert len(made) == count <= 7


def test_closing_waits_for_what_runs_and_cancels_what_is_queued():
    gate, started = threading.Event(), []

    def held(k: int) -> None:
        started.append(k)
        if k:
            gate.wait(10)

    ahead = Prefetcher(held, range(1000), 1)
    next(ahead)  # 1 now runs or will, 2 is queued
    while len(started) < 2:
        time.sleep(0.001)
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    ahead.close()
    assert gate.is_set()
    assert started == [0, 1]
    opener.join()


def test_waiting_is_measured():
    with Prefetcher(time.sleep, [0.03, 0.03], 0) as ahead:
        list(ahead)
        assert 0.06 <= ahead.waited < 2
