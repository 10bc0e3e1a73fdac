"""HDF5 files whose layout is known before their content: filled in any order, and filled on after an interruption.

The file is made once, with an index and with columns, contiguous data sets that have their place but no values yet.
From then on HDF5 has no part in it: values go straight to their places, and nothing of the format ever changes. So
threads can write side by side, the file is a whole one whatever kills the process, and in the end its bytes depend
neither on the order of writing nor on interruptions. It grows under a name of its own beside the output.

Values come in units (an image, a map). The data set ``written``, uint8 [units], says which are there; a unit counts
only after its values are on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from altopt.errors import ArtifactError, ResourceError
from cache.files import DeferringFile, atomic_path, canonical_json, file_error, publish

FORMAT_VERSION = 1
FLUSH_BYTES = 1 << 26  # what an interruption can cost is at most this much of what was written
REMEDY = 'make it again ("altopt plan" says how)'

Array = NDArray[Any]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Column:
    """A data set that is filled later: its dtype and its shape, rows first."""

    dtype: DTypeLike
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """The size of a row."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[1:])


class PreallocatedWriter:
    """Fills ``columns`` unit by unit; the file appears when the ``with`` block ends well and every unit is there.

    ``attributes`` are text, or JSON-able values that become text; ``index`` holds arrays and lists of text that are
    known from the beginning. What an interrupted writer of the same attributes, index and columns left is filled on.
    Raises ResourceError when there is no room.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any], index: Mapping[str, Array | Sequence[str]],
                 columns: Mapping[str, Column], units: int) -> None:
        self.path, self.growing = path, growing_path(path)
        self._index = {name: _plain(values) for name, values in index.items()}
        self._columns = {**columns, "written": Column(np.uint8, (units,))}
        self._attributes = {name: value if isinstance(value, str) else canonical_json(value)
                            for name, value in attributes.items()}
        self._attributes["layout"] = self._layout()
        self._lock = threading.Lock()
        self._waiting: list[int] = []
        self._waiting_bytes = 0

    def __enter__(self) -> PreallocatedWriter:
        if not self._resumable():
            self._create()
        with PreallocatedFile(self.growing, {}, complete=False) as file:
            self._places = {name: file.places[name] for name in self._columns}
            self._done = file.rows("written", 0, file.length("written")).astype(bool)
        self._descriptor = os.open(self.growing, os.O_RDWR)
        return self

    def done(self, unit: int) -> bool:
        """Return whether the unit's values are there, from this process or an earlier one."""
        return bool(self._done[unit])

    def write(self, unit: int, values: Mapping[str, tuple[int, Array]]) -> None:
        """Write a unit's values: {column: (first row, rows)}. May be called by several threads."""
        size = 0
        for name, (row, rows) in values.items():
            column = self._columns[name]
            rows = np.ascontiguousarray(rows, column.dtype)
            if rows.shape[1:] != column.shape[1:] or row + len(rows) > column.shape[0]:
                raise ValueError(f"{name}: rows {row} + {rows.shape} do not fit into {column.shape}")
            self._put(name, row, rows)
            size += rows.nbytes
        with self._lock:
            self._waiting.append(unit)
            self._waiting_bytes += size
            if self._waiting_bytes >= FLUSH_BYTES:
                self._flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self._flush()
        except Exception:
            if error is None:
                raise
        finally:
            os.close(self._descriptor)
        if error is None:
            if not self._done.all():
                raise ValueError(f"{self.path.name}: unit {int(self._done.argmin())} was never written")
            publish(self.growing, self.path)

    def _layout(self) -> str:
        """Return a hash of all that is known from the beginning."""
        hasher = hashlib.sha256(canonical_json([
            FORMAT_VERSION, self._attributes,
            {name: [str(np.dtype(column.dtype)), column.shape] for name, column in self._columns.items()},
        ]).encode())
        for name, values in sorted(self._index.items()):
            hasher.update(canonical_json([name, str(values.dtype), values.shape]).encode() + values.tobytes())
        return hasher.hexdigest()

    def _resumable(self) -> bool:
        if not self.growing.exists():
            return False
        try:
            with PreallocatedFile(self.growing, {}, complete=False) as file:
                return file.attributes.get("layout") == self._attributes["layout"]
        except ArtifactError:
            return False

    def _create(self) -> None:
        import h5py

        self.growing.unlink(missing_ok=True)  # of other content, and its room may be needed
        with atomic_path(self.growing) as temporary, DeferringFile(temporary, "w+") as output:
            self._require_room()
            with h5py.File(output, "w", libver=("earliest", "v110")) as file:
                for name, value in sorted(self._attributes.items()):
                    file.attrs.create(name, value.encode(), dtype=_text_type([value.encode()]))
                file.attrs["format_version"] = FORMAT_VERSION
                for name, values in sorted(self._index.items()):
                    file[name] = values
                for name, column in sorted(self._columns.items()):
                    _allocate(file, name, column)
            if output.error:
                raise file_error(self.path, output.error, "written") from output.error
            # Allocated is more than written: the last column may end beyond what HDF5 has touched so far.
            output.truncate(_end_of(temporary, self._columns))

    def _require_room(self) -> None:
        """Raise ResourceError now rather than after hours, when the disk cannot hold all the columns."""
        needed = sum(column.row_bytes * column.shape[0] for column in self._columns.values())
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise ResourceError(f"{self.path} will take {needed:,} bytes, and its disk has {free:,} free: make room, "
                                "or store less (fewer images, scales or proposals, or a smaller type)")

    def _put(self, name: str, row: int, rows: Array) -> None:
        if rows.nbytes == 0:
            return
        view = memoryview(rows.reshape(-1).view(np.uint8).data)
        place = self._places[name] + row * self._columns[name].row_bytes
        try:
            while view:
                written = os.pwrite(self._descriptor, view, place)
                view, place = view[written:], place + written
        except OSError as error:
            raise file_error(self.path, error, "written") from error

    def _flush(self) -> None:
        """Bring values to the disk, and only then say that they are there."""
        if not self._waiting:
            return
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise file_error(self.path, error, "written") from error
        for unit in self._waiting:
            self._put("written", unit, np.ones(1, np.uint8))
            self._done[unit] = True
        self._waiting, self._waiting_bytes = [], 0


class KeyedWriter(Generic[Key]):
    """A ``PreallocatedWriter`` whose units have keys, in the order of ``keys``; for a file of one certain content."""

    def __init__(self, path: Path, attributes: Mapping[str, Any], index: Mapping[str, Array | Sequence[str]],
                 columns: Mapping[str, Column], keys: Iterable[Key]) -> None:
        self._units = {key: unit for unit, key in enumerate(keys)}
        self._file = PreallocatedWriter(path, attributes, index, columns, len(self._units))

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._file.__exit__(kind, error, traceback)

    def done(self, key: Key) -> bool:
        """Return whether what has this key is there already."""
        return self._file.done(self._units[key])


class PreallocatedFile:
    """Reads the columns of such a file, any rows at any time; threads may share it, and processes after a fork.

    ``expected`` names the data sets that must be there, with their dtypes (None for text). The file is opened at the
    first reading of rows. Raises ArtifactError for a file that is missing, damaged, unfinished or of another schema.
    """

    def __init__(self, path: Path, expected: Mapping[str, DTypeLike | None], complete: bool = True) -> None:
        self.path = path
        self.places: dict[str, int] = {}
        self.attributes: dict[str, str] = {}
        self._columns: dict[str, Column] = {}
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        try:
            self._read_layout(expected)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py on a damaged file
            if isinstance(error, OSError) and error.errno is not None:
                raise file_error(path, error, "read") from error
            raise self.error("it is no HDF5 file, or damaged") from error
        if complete and not self.rows("written", 0, self.length("written")).all():
            raise self.error("it was not finished")

    def length(self, name: str) -> int:
        """Return the number of rows of a data set."""
        return self._columns[name].shape[0]

    def width(self, name: str) -> int:
        """Return the number of values in a row of a data set."""
        return math.prod(self._columns[name].shape[1:])

    def rows(self, name: str, begin: int, end: int) -> Array:
        """Return the rows begin .. end of a data set of numbers."""
        column = self._columns[name]
        if not 0 <= begin <= end <= column.shape[0]:
            raise IndexError(f"{name}: rows {begin} .. {end} of {column.shape[0]}")
        values = np.empty((end - begin, *column.shape[1:]), column.dtype)
        if values.nbytes:
            self._fill(values, self.places[name] + begin * column.row_bytes)
        return values

    def all(self, name: str) -> Array:
        """Return a whole data set of numbers."""
        return self.rows(name, 0, self.length(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a data set of text."""
        return tuple(text.decode("utf-8") for text in self.all(name).tolist())

    def close(self) -> None:
        """Close the file; the next reading opens it again."""
        with self._lock:
            if self._descriptor is not None:
                self._finalizer()
            self._descriptor = None

    def __enter__(self) -> PreallocatedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def error(self, cause: str, remedy: str = REMEDY) -> ArtifactError:
        """Return the error that says why the file cannot be used."""
        return ArtifactError(f"{self.path} cannot be used: {cause}: {remedy}")

    def _fill(self, values: Array, place: int) -> None:
        view = memoryview(values.reshape(-1).view(np.uint8).data)
        descriptor = self._open()
        while view:
            count = os.preadv(descriptor, [view], place)
            if count == 0:
                raise self.error("it is cut short")
            view, place = view[count:], place + count

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self.path, os.O_RDONLY)
                except OSError as error:
                    raise file_error(self.path, error, "read") from error
                self._finalizer = weakref.finalize(self, os.close, self._descriptor)
            return self._descriptor

    def _read_layout(self, expected: Mapping[str, DTypeLike | None]) -> None:
        import h5py

        with h5py.File(self.path, "r", locking=False) as file:
            if file.attrs.get("format_version") != FORMAT_VERSION:
                raise self.error(f"its format version is {file.attrs.get('format_version')}, this altopt reads "
                                 f"{FORMAT_VERSION}")
            self.attributes = {name: value if isinstance(value, str) else value.decode("utf-8")
                               for name, value in file.attrs.items() if isinstance(value, str | bytes)}
            for name in {*file, *expected, "written"}:
                self._read_column(file, name, h5py)
        for name, dtype in expected.items():
            held = np.dtype(self._columns[name].dtype)
            if held.kind != "S" if dtype is None else held != dtype:
                raise self.error(f"{name} is {held}, not {'text' if dtype is None else np.dtype(dtype)}")

    def _read_column(self, file: Any, name: str, h5py: Any) -> None:
        """Take in a data set's place; what HDF5 can do beyond plain contiguous data reaches other files."""
        if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
            raise self.error(f"it has no data set {name}")
        dataset = file[name]
        properties = dataset.id.get_create_plist()
        if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count():
            raise self.error(f"{name} is not contiguous, or lies outside the file")
        if dataset.nbytes and dataset.id.get_offset() is None:
            raise self.error(f"{name} was never written")
        text = h5py.check_string_dtype(dataset.dtype)
        self._columns[name] = Column(f"S{text.length}" if text else dataset.dtype, dataset.shape)
        self.places[name] = dataset.id.get_offset() or 0


def growing_path(path: Path) -> Path:
    """Return where a file lies while it is filled: beside the output."""
    return path.with_name(f"{path.stem}.growing{path.suffix}")


def _plain(values: Array | Sequence[str]) -> Array:
    if isinstance(values, np.ndarray):
        return values
    texts = [text.encode() for text in values]
    return np.asarray(texts, _text_type(texts))


def _text_type(texts: Sequence[bytes]) -> Any:
    """Return a dtype of fixed width: HDF5 keeps text of variable width in a heap, which need not repeat its bytes."""
    import h5py

    return h5py.string_dtype("utf-8", max([1, *map(len, texts)]))


def _allocate(file: Any, name: str, column: Column) -> None:
    """Give a data set its place in the file without writing to it; HDF5 leaves a hole, which reads as zeros."""
    import h5py

    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the time of writing is no part of the content
    space = h5py.h5s.create_simple(column.shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(column.dtype)), space, properties)


def _end_of(path: Path, columns: Mapping[str, Column]) -> int:
    with contextlib.closing(PreallocatedFile(path, {}, complete=False)) as file:
        ends = [file.places[name] + column.row_bytes * column.shape[0] for name, column in columns.items()]
        return max(path.stat().st_size, *ends)
