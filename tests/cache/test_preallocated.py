import errno
import json
import os
import threading
from contextlib import suppress

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from altopt.errors import ArtifactError, ResourceError
from cache.checkpoints import save_checkpoint
from cache.files import sha256_file
from cache.preallocated import PreallocatedFile, PreallocatedWriter, growing_path

UNITS = {
    "a": {"values": ("float32", (2, 3)), "marks": ("int32", (2,))},
    "b/ä.jpg": {"values": ("float32", (3, 3)), "marks": ("int32", (3,))},
    "none": {"values": ("float32", (0, 3)), "marks": ("int32", (0,))},
}
A, B, NONE = UNITS
DESCRIPTION = {"about": "tests", "settings": {"b": 1, "a": [2]}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "F1.safetensors"


def writer(path, description=DESCRIPTION, units=UNITS, kind="numbers"):
    return PreallocatedWriter(path, kind, description, units)


def arrays(unit):
    rows = UNITS[unit]["marks"][1][0]
    return {"values": np.arange(1, 3 * rows + 1, dtype=np.float32).reshape(-1, 3),
            "marks": np.arange(rows, dtype=np.int32)}


def write(path, units=tuple(UNITS), **changes):
    with writer(path, **changes) as file:
        for unit in units:
            file.put(unit, arrays(unit))


def stop_after(path, units, **changes):
    with suppress(KeyboardInterrupt), writer(path, **changes) as file:
        for unit in units:
            file.put(unit, arrays(unit))
        raise KeyboardInterrupt


def damage(path):
    """Change a byte of the first unit's values."""
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 5] ^= 1
    path.write_bytes(content)


def test_round_trip(path):
    write(path)
    with PreallocatedFile(path, "numbers") as file:
        assert list(file.units) == list(UNITS)
        assert DESCRIPTION.items() <= file.description.items()
        for unit in UNITS:
            assert file.whole(unit)
            for name, values in arrays(unit).items():
                np.testing.assert_array_equal(file.units[unit][name], values)
                assert file.units[unit][name].dtype == values.dtype
        with pytest.raises(ValueError, match="read-only"):
            file.units[A]["values"][:] = 0
    assert not growing_path(path).exists()


def test_other_programs_read_it(path):
    write(path)
    held = load_file(path)
    assert set(held) == {f"{unit}/{name}" for unit in UNITS for name in ("values", "marks")} | {"checksums"}
    np.testing.assert_array_equal(held[f"{B}/values"], arrays(B)["values"])


def test_arrays_are_the_file_s_memory_and_begin_where_vectors_like_it(path):
    write(path)
    with PreallocatedFile(path) as file:
        values = file.units[A]["values"]
        assert not values.flags.owndata
        assert values.ctypes.data % 64 == 0


@pytest.mark.parametrize("order", [(A, B, NONE), (NONE, A, B)])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_bytes_depend_neither_on_order_nor_on_interruptions(path, tmp_path, order, stop):
    write(tmp_path / "whole.safetensors")
    stop_after(path, order[:stop])
    assert not path.exists()
    with writer(path) as file:
        assert [file.done(unit) for unit in UNITS] == [unit in order[:stop] for unit in UNITS]
        for unit in order[stop:]:
            file.put(unit, arrays(unit))
    assert sha256_file(path) == sha256_file(tmp_path / "whole.safetensors")


@pytest.mark.parametrize("change", [
    {"description": {"about": "others"}}, {"units": {**UNITS, "more": UNITS[A]}}, {"kind": "letters"},
    {"units": {**UNITS, A: {"values": ("float16", (2, 3)), "marks": ("int32", (2,))}}},
])
def test_what_was_left_by_another_content_is_not_filled_on(path, change):
    stop_after(path, UNITS)
    with pytest.raises(ValueError, match="a was never written"), writer(path, **change) as file:
        assert not any(file.done(unit) for unit in UNITS)


@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_damaged_beginning_is_made_anew(path, size):
    stop_after(path, [A])
    os.truncate(growing_path(path), size)
    write(path)
    with PreallocatedFile(path) as file:
        assert all(file.whole(unit) for unit in UNITS)


def test_what_did_not_reach_the_disk_is_written_again(path, tmp_path):
    """After a power cut the checksum may be there and the values not, or the other way round."""
    write(tmp_path / "whole.safetensors")
    stop_after(path, [A, B])
    damage(growing_path(path))
    with writer(path) as file:
        assert [file.done(unit) for unit in UNITS] == [False, True, False]
        for unit in (A, NONE):
            file.put(unit, arrays(unit))
            assert file.done(unit)
    assert sha256_file(path) == sha256_file(tmp_path / "whole.safetensors")


def test_damaged_values_and_exchanged_units_are_noticed(path):
    write(path, units=[A, NONE, B])
    damage(path)
    with PreallocatedFile(path) as file:
        assert [file.whole(unit) for unit in UNITS] == [False, True, True]
    content = path.read_bytes()
    path.write_bytes(content.replace("b/ä.jpg".encode(), "b/ö.jpg".encode()))
    with PreallocatedFile(path) as file:
        assert [file.whole(unit) for unit in file.units] == [False, False, True]


def test_a_missing_unit_is_an_error_and_nothing_appears(path):
    with pytest.raises(ValueError, match=r"b/ä.jpg was never written"):
        write(path, (A, NONE))
    assert not path.exists()


def test_threads_write_and_read_side_by_side(path):
    count = 64
    with PreallocatedWriter(path, "", {}, {str(n): {"values": ("int64", (10, 50))} for n in range(count)}) as file:
        def work(first):
            for unit in range(first, count, 4):
                file.put(str(unit), {"values": np.full((10, 50), unit)})

        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with PreallocatedFile(path) as written:
        assert all(written.whole(unit) and (written.units[unit]["values"] == int(unit)).all()
                   for unit in written.units)


@pytest.mark.parametrize("values", [np.zeros((2, 4), np.float32), np.zeros((3, 3), np.float32), np.zeros((2, 3))])
def test_arrays_that_do_not_fit_are_refused(path, values):
    with pytest.raises(ValueError, match=r"a: values is .*, not float32 \(2, 3\)"), writer(path) as file:
        file.put(A, arrays(A) | {"values": values})


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_says_so_and_what_is_there_stays(path, monkeypatch, call):
    stop_after(path, [A])
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match=r"F1.safetensors cannot be written: the disk is full .* make room"):
        write(path, (B, NONE))
    monkeypatch.undo()
    assert not path.exists()
    with writer(path) as file:
        assert [file.done(unit) for unit in UNITS] == [True, call == "fsync", call == "fsync"]
        for unit in (B, NONE):
            file.put(unit, arrays(unit))


def test_a_file_that_cannot_fit_is_refused_at_once(path):
    with pytest.raises(ResourceError, match=r"F1.safetensors will take 4,503,599,627,370,\d+ bytes"), \
            PreallocatedWriter(path, "", {}, {"a": {"values": ("float32", (1 << 40, 1024))}}):
        pass
    assert list(path.parent.iterdir()) == []


def test_unfinished_missing_and_foreign_files(path, tmp_path):
    stop_after(path, [A])
    with pytest.raises(ArtifactError, match="was not finished"):
        PreallocatedFile(growing_path(path))
    with pytest.raises(ArtifactError, match="is missing"):
        PreallocatedFile(path)
    for content in (b"", b"no such file", b"\2\0\0\0\0\0\0\0{}", b"\2\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0null"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"does not hold numbers of format version 2 .*, or is damaged: make"):
            PreallocatedFile(path, "numbers")
    save_checkpoint(path, {}, {"kind": "snapshot"})
    with pytest.raises(ArtifactError, match="does not hold features"):
        PreallocatedFile(path)
    write(path, kind="letters")
    with pytest.raises(ArtifactError, match="does not hold numbers"):
        PreallocatedFile(path, "numbers")


def test_a_file_of_an_earlier_altopt_is_refused_with_the_way_on(path):
    with h5py.File(path, "w") as file:
        file.attrs["format_version"] = 1
        file["written"] = np.ones(1, np.uint8)
    with pytest.raises(ArtifactError, match=r"format version 2 \(earlier ones were HDF5\).*make it again"):
        PreallocatedFile(path)


@pytest.mark.parametrize("change", [
    lambda header: header.update(checksums={**header["checksums"], "shape": [2]}),
    lambda header: header["a/values"].update(shape=[-2, -3]),
    lambda header: header["a/values"].update(shape=[3, 3]),
    lambda header: header["a/values"].update(dtype="F16"),
    lambda header: header["a/values"].update(dtype="X9"),
    lambda header: header["a/values"].update(data_offsets=[4, 28]),
    lambda header: header.pop("a/values"),
    lambda header: header.pop("checksums"),
    lambda header: header.pop("__metadata__"),
    lambda header: header["__metadata__"].update(altopt="[]"),
    lambda header: header["__metadata__"].update(altopt='{"kind":"numbers","format_version":3}'),
])
def test_headers_that_do_not_fit_are_refused(path, change):
    write(path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(ArtifactError, match="does not hold features of format version 2"):
        PreallocatedFile(path)


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_file_that_was_cut_short_or_grew_is_refused(path, cut):
    write(path)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(ArtifactError, match="is damaged"):
        PreallocatedFile(path)
    os.truncate(path, path.stat().st_size + 2 * cut)
    with pytest.raises(ArtifactError, match="is damaged"):
        PreallocatedFile(path)
