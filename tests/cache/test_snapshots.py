import logging

import pytest
import torch

from altopt.errors import ResourceError
from cache.checkpoints import first_difference, save_checkpoint
from cache.snapshots import SnapshotClock, load_snapshot, save_snapshot


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".M1.snapshot"


@pytest.fixture
def state():
    return {"weight": torch.randn(3, 4), "momentum": torch.randn(3, 4)}


def test_round_trip(path, state):
    save_snapshot(path, key="k", iteration=40, tensors=state, seconds=0.1 + 0.2)
    iteration, tensors, seconds = load_snapshot(path, "k")
    assert (iteration, seconds) == (40, 0.1 + 0.2)
    assert first_difference(state, tensors) is None


def test_later_one_takes_the_place(path, state, names):
    save_snapshot(path, key="k", iteration=1, tensors=state, seconds=1.0)
    save_snapshot(path, key="k", iteration=2, tensors=state, seconds=2.0)
    assert load_snapshot(path, "k")[0] == 2
    assert names(path.parent) == [path.name]


def test_missing_one_is_silent(path, caplog):
    caplog.set_level(logging.DEBUG)
    assert load_snapshot(path, "k") is None
    assert not caplog.records


def test_one_of_another_training(path, state, caplog):
    caplog.set_level(logging.INFO)
    save_snapshot(path, key="k", iteration=1, tensors=state, seconds=1.0)
    assert load_snapshot(path, "other") is None
    assert "is of another training" in caplog.text


def test_cut_one(path, state, caplog):
    save_snapshot(path, key="k", iteration=1, tensors=state, seconds=1.0)
    path.write_bytes(path.read_bytes()[:-1])
    assert load_snapshot(path, "k") is None
    assert "is not used" in caplog.text


def test_one_flipped_bit_in_the_weights(path, state, caplog):
    save_snapshot(path, key="k", iteration=1, tensors=state, seconds=1.0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load_snapshot(path, "k") is None
    assert "the tensors are not the ones" in caplog.text


def test_checkpoint_with_the_key_but_without_the_state(path, state, caplog):
    save_checkpoint(path, state, {"key": "k"})
    assert load_snapshot(path, "k") is None
    assert "is not used" in caplog.text


def test_full_disk_keeps_the_last_one(path, state, file_size_limit):
    save_snapshot(path, key="k", iteration=1, tensors=state, seconds=1.0)
    with file_size_limit(1000), pytest.raises(ResourceError):
        save_snapshot(path, key="k", iteration=2, tensors={"weight": torch.zeros(1000)}, seconds=2.0)
    assert load_snapshot(path, "k")[0] == 1



class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_clock_waits_from_the_end_of_the_last():
    clock = Clock()
    snapshots = SnapshotClock(60.0, clock)
    clock.now += 59
    assert not snapshots.due()
    clock.now += 1
    assert snapshots.due()
    with snapshots.writing():
        clock.now += 1
    clock.now += 59
    assert not snapshots.due()
    clock.now += 1
    assert snapshots.due()


def test_clock_spends_at_most_a_fiftieth_on_writing():
    clock = Clock()
    snapshots = SnapshotClock(60.0, clock)
    with snapshots.writing():
        clock.now += 10
    clock.now += 499
    assert not snapshots.due()
    clock.now += 1
    assert snapshots.due()
