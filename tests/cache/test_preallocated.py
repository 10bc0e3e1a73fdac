import errno
import os
import threading
import time
from contextlib import suppress
from typing import Any

import h5py
import numpy as np
import pytest

from altopt.errors import ArtifactError, ResourceError
from cache.files import sha256_file
from cache.preallocated import Column, PreallocatedFile, PreallocatedWriter, growing_path

INDEX: dict[str, Any] = {"names": ["a", "bä", ""], "ends": np.array([2, 5, 5], np.int64)}
COLUMNS = {"values": Column(np.float32, (5, 3)), "marks": Column(np.uint16, (5,)), "empty": Column(np.float32, (0, 7))}
ROWS = {0: (0, 2), 1: (2, 5), 2: (5, 5)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "F1.h5"


def writer(path, attributes=None, index=None, columns=None):
    return PreallocatedWriter(path, attributes or {"about": "tests", "settings": {"b": 1, "a": [2]}},
                              INDEX if index is None else index, columns or COLUMNS, 3)


def values(begin, end):
    return np.arange(3 * begin, 3 * end, dtype=np.float32).reshape(-1, 3), np.arange(begin, end, dtype=np.uint16)


def put(file, unit):
    begin, end = ROWS[unit]
    numbers, marks = values(begin, end)
    file.write(unit, {"values": (begin, numbers), "marks": (begin, marks)})


def write(path, units=(0, 1, 2), **changes):
    with writer(path, **changes) as file:
        for unit in units:
            put(file, unit)


def stop_after(path, units, **changes):
    with suppress(KeyboardInterrupt), writer(path, **changes) as file:
        for unit in units:
            put(file, unit)
        raise KeyboardInterrupt


def test_round_trip(path):
    write(path)
    with PreallocatedFile(path, {"names": None, "values": np.float32}) as file:
        assert file.texts("names") == ("a", "bä", "")
        assert file.all("ends").tolist() == [2, 5, 5]
        assert {"about": "tests", "settings": '{"a":[2],"b":1}'}.items() <= file.attributes.items()
        assert (file.length("values"), file.width("values"), file.width("marks")) == (5, 3, 1)
        np.testing.assert_array_equal(file.rows("values", 1, 4), values(1, 4)[0])
        np.testing.assert_array_equal(file.all("marks"), values(0, 5)[1])
        assert file.rows("values", 5, 5).shape == (0, 3)
        assert file.all("empty").shape == (0, 7)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["values"], values(0, 5)[0])
        assert file["names"].asstr()[:].tolist() == ["a", "bä", ""]
    assert not growing_path(path).exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_bytes_depend_neither_on_order_nor_on_interruptions(path, tmp_path, order, stop):
    write(tmp_path / "whole.h5")
    stop_after(path, order[:stop])
    assert not path.exists()
    with writer(path) as file:
        assert [file.done(unit) for unit in range(3)] == [unit in order[:stop] for unit in range(3)]
        for unit in order[stop:]:
            put(file, unit)
    assert sha256_file(path) == sha256_file(tmp_path / "whole.h5")


@pytest.mark.parametrize("change", [
    {"attributes": {"about": "others"}}, {"index": {**INDEX, "ends": np.array([1, 5, 5], np.int64)}},
    {"columns": {**COLUMNS, "values": Column(np.float32, (5, 4))}},
])
def test_what_was_left_by_another_content_is_not_filled_on(path, change):
    stop_after(path, [0, 1, 2])
    with pytest.raises(ValueError, match="unit 0 was never written"), writer(path, **change) as file:
        assert not any(file.done(unit) for unit in range(3))


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_damaged_beginning_is_made_anew(path, size):
    stop_after(path, [0])
    os.truncate(growing_path(path), size)
    write(path)
    with PreallocatedFile(path, {}) as file:
        np.testing.assert_array_equal(file.all("values"), values(0, 5)[0])


def test_a_missing_unit_is_an_error_and_nothing_appears(path):
    with pytest.raises(ValueError, match="unit 1 was never written"):
        write(path, (0, 2))
    assert not path.exists()


def test_a_unit_counts_only_after_its_values_are_on_the_disk(path, monkeypatch):
    """A process that is killed runs no ``finally``: what it had not flushed is written again."""
    import cache.preallocated as module

    monkeypatch.setattr(module, "FLUSH_BYTES", 28)
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(descriptor))
    with suppress(KeyboardInterrupt), writer(path) as file:
        put(file, 2)
        assert (file.done(2), len(synced)) == (False, 0)
        put(file, 0)
        assert (file.done(2), file.done(0), len(synced)) == (True, True, 1)
        with PreallocatedFile(growing_path(path), {}, complete=False) as other:
            assert other.all("written").tolist() == [1, 0, 1]
        raise KeyboardInterrupt


def test_threads_write_side_by_side(path):
    count = 64
    columns = {"values": Column(np.int64, (count * 10, 50))}
    with PreallocatedWriter(path, {}, {}, columns, count) as file:
        def work(first):
            for unit in range(first, count, 4):
                file.write(unit, {"values": (10 * unit, np.full((10, 50), unit))})

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with PreallocatedFile(path, {}) as read:
        expected = np.repeat(np.arange(count), 10)[:, None]
        assert (read.all("values") == expected).all()


@pytest.mark.parametrize("rows", [(4, (2, 3)), (0, (2, 4))])
def test_rows_that_do_not_fit_are_refused(path, rows):
    row, shape = rows
    with pytest.raises(ValueError, match="values: rows"), writer(path) as file:
        file.write(0, {"values": (row, np.zeros(shape, np.float32))})


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_full_disk_says_so_and_what_is_there_stays(path, monkeypatch, call):
    stop_after(path, [0])
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match=r"F1.h5 cannot be written: the disk is full .* make room"):
        write(path, (1, 2))
    monkeypatch.undo()
    assert not path.exists()
    with writer(path) as file:
        assert [file.done(unit) for unit in range(3)] == [True, False, False]
        put(file, 1)
        put(file, 2)


def test_a_file_that_cannot_fit_is_refused_at_once(path):
    columns = {"values": Column(np.float32, (1 << 40, 1024))}
    with pytest.raises(ResourceError, match=r"F1.h5 will take 4,503,599,627,370,497 bytes"), \
            PreallocatedWriter(path, {}, {}, columns, 1):
        pass
    assert list(path.parent.iterdir()) == []


def test_bytes_do_not_depend_on_the_time(path, tmp_path):
    write(path)
    time.sleep(1.1)  # HDF5 counts in seconds
    write(tmp_path / "later.h5")
    assert sha256_file(path) == sha256_file(tmp_path / "later.h5")


def test_unfinished_missing_and_foreign_files(path, tmp_path):
    stop_after(path, [0])
    with pytest.raises(ArtifactError, match="was not finished"):
        PreallocatedFile(growing_path(path), {})
    with pytest.raises(ArtifactError, match="is missing"):
        PreallocatedFile(path, {})
    (tmp_path / "text.h5").write_text("no such file")
    with pytest.raises(ArtifactError, match="no HDF5 file"):
        PreallocatedFile(tmp_path / "text.h5", {})
    write(path)
    with pytest.raises(ArtifactError, match="marks is uint16, not float64"):
        PreallocatedFile(path, {"marks": np.float64})
    with pytest.raises(ArtifactError, match="it has no data set others"):
        PreallocatedFile(path, {"others": np.float64})


@pytest.mark.parametrize("make", [
    lambda file: file.create_dataset("x", (4,), "f4", chunks=(2,)),
    lambda file: file.create_dataset("x", (4,), "f4", external=[("/etc/passwd", 0, 16)]),
    lambda file: file.__setitem__("x", h5py.ExternalLink("other.h5", "/x")),
    lambda file: file.__setitem__("x", h5py.SoftLink("/written")),
])
def test_only_plain_contiguous_data_is_read(path, make):
    with h5py.File(path, "w") as file:
        file.attrs["format_version"] = 1
        file["written"] = np.ones(1, np.uint8)
        make(file)
    with pytest.raises(ArtifactError, match=r"no data set x|not contiguous"):
        PreallocatedFile(path, {"x": np.float32})


def test_another_format_version_is_refused(path):
    write(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(ArtifactError, match="format version is 2, this altopt reads 1"):
        PreallocatedFile(path, {})


def test_rows_outside_are_an_error(path):
    write(path)
    with PreallocatedFile(path, {}) as file, pytest.raises(IndexError, match=r"rows 4 .. 6 of 5"):
        file.rows("values", 4, 6)
