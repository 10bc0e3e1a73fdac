"""Arrays on disk, in a file whose layout is known before its content: filled in any order, and on after a kill.

The file is safetensors. Its units (a map, the regions of an image) have arrays, UNIT/ARRAY, one behind the other.
Behind them all stands ``checksums``, int64 [units]: the CRC-32 of each unit, 0 while it is not written.
"""
# safetensors, because many programs read it. The file grows, full of holes, beside the output, and gets its name by a
# rename when it is complete: its bytes depend neither on the order of writing nor on interruptions.

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from altopt.errors import ArtifactError, ResourceError
from cache.checkpoints import DTYPES, METADATA_KEY, Header, read_header
from cache.files import atomic_path, canonical_json, file_error, publish

FORMAT_VERSION = 2  # version 1 was HDF5
ALIGNMENT = 64  # bytes: as torch aligns its own tensors
# NumPy has no bfloat16: its bits are taken as they are.
NUMPY = {code: np.dtype("uint16" if code == "BF16" else name) for name, code in DTYPES.items()}

Array = NDArray[np.generic]
ArrayType = tuple[str, tuple[int, ...]]  # what an array will be: its dtype, in torch's words, and its shape
Key = TypeVar("Key")


class PreallocatedWriter(Generic[Key]):
    """Fills units, named by ``str(key)``; the file appears when the ``with`` block ends well and every unit is there.

    Raises ResourceError when there is no room.
    """
    # What an interrupted writer of the same file left is kept, as far as checksums say that it is whole: they alone are
    # believed, so nothing need reach the disk in a certain order.

    def __init__(self, path: Path, kind: str, description: Mapping[str, object],
                 units: Mapping[Key, Mapping[str, ArrayType]]) -> None:
        self.path, self.growing, self._keys = path, growing_path(path), list(units)
        types = {f"{key}/{name}": each for key, arrays in units.items() for name, each in arrays.items()}
        types["checksums"] = "int64", (len(units),)
        about = {"format_version": FORMAT_VERSION, "kind": kind, **description}
        header: Header = {"__metadata__": {METADATA_KEY: canonical_json(about)}}
        self._begins, end = dict[str, int](), 0
        for name, (dtype, shape) in types.items():
            self._begins[name], end = end, end + NUMPY[DTYPES[dtype]].itemsize * math.prod(shape)
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [self._begins[name], end]}
        # In the order of the units, by which readers go; canonical JSON would sort them.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self._size = len(self._header) + end

    def __enter__(self) -> Self:
        resumable = (self.growing.is_file() and self.growing.stat().st_size == self._size
                     and np.fromfile(self.growing, np.uint8, len(self._header)).tobytes() == self._header)
        if not resumable:
            self.growing.unlink(missing_ok=True)  # of other content, and its room may be needed
            with atomic_path(self.growing) as temporary, temporary.open("wb") as output:
                free = shutil.disk_usage(self.path.parent).free
                if self._size > free:  # better now than after hours
                    raise ResourceError(f"{self.path} will take {self._size:,} bytes, and its disk has {free:,} free: "
                                        "make room, or store less (fewer images, scales or proposals, a smaller type)")
                output.write(self._header)
                output.truncate(self._size)
        self._file = PreallocatedFile(self.growing, complete=False)
        self._descriptor = os.open(self.growing, os.O_RDWR)
        return self

    def done(self, key: Key) -> bool:
        """Return whether the unit is there and whole, from this process or an earlier one."""
        return self._file.whole(str(key))

    def put(self, key: Key, arrays: Mapping[str, Array]) -> None:
        """Write a unit; ValueError unless its arrays are of the types that were said."""
        expected = self._file.units[str(key)]
        for name, place in expected.items():
            values = arrays[name]
            if (values.dtype, values.shape) != (place.dtype, place.shape):
                raise ValueError(f"{key}: {name} is {values.dtype} {values.shape}, not {place.dtype} {place.shape}")
            self._write(values, self._begins[f"{key}/{name}"])
        checksum = _checksum(str(key), (arrays[name] for name in expected))
        self._write(np.array([checksum]), self._begins["checksums"] + 8 * self._file.numbers[str(key)])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        os.close(self._descriptor)
        if error is None:
            if not self._file.checksums.all():
                raise ValueError(f"{self.path.name}: {self._keys[self._file.checksums.argmin()]} was never written")
            publish(self.growing, self.path)

    def _write(self, values: Array, begin: int) -> None:
        view, place = _bytes(values), len(self._header) + begin
        try:
            while view:
                written = os.pwrite(self._descriptor, view, place)
                view, place = view[written:], place + written
        except OSError as error:
            raise file_error(self.path, error, "written") from error


class PreallocatedFile:
    """Reads such a file: ``units`` holds the arrays of each, by name, not to be written to; threads and forks share it.

    Raises ArtifactError for a file that is missing, damaged, unfinished, of an earlier format or of another ``kind``.
    """
    # The arrays are the file's own memory pages: nothing is copied, and a disk that fails under them ends the process.

    def __init__(self, path: Path, kind: str = "", complete: bool = True) -> None:
        self.path = path
        self.units: dict[str, dict[str, Array]] = {}
        try:
            header, begin = read_header(path)
            self.description: dict[str, object] = json.loads(header.pop("__metadata__")[METADATA_KEY])
            if self.description["format_version"] != FORMAT_VERSION or kind not in ("", self.description["kind"]):
                raise ValueError("it is of another version or kind")
            self.checksums = self._mapped(header, begin)
        except OSError as error:
            raise file_error(path, error, "read") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.error(f"it does not hold {kind or 'features'} of format version {FORMAT_VERSION} (earlier ones "
                             "were HDF5), or is damaged") from error
        self.numbers = {unit: number for number, unit in enumerate(self.units)}
        self._whole: set[str] = set()
        if complete and not self.checksums.all():
            raise self.error("it was not finished")

    def whole(self, unit: str) -> bool:
        """Return whether the unit's arrays are those that were written; looked at once, then remembered."""
        checksum = self.checksums[self.numbers[unit]]
        if unit not in self._whole and checksum and checksum == _checksum(unit, self.units[unit].values()):
            self._whole.add(unit)
        return unit in self._whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.units.clear()  # the file stays mapped as long as arrays of it live

    def error(self, cause: str, remedy: str = 'make it again ("altopt plan" says how)') -> ArtifactError:
        """Return the error that says why the file cannot be used."""
        return ArtifactError(f"{self.path} cannot be used: {cause}: {remedy}")

    def _mapped(self, header: Header, begin: int) -> Array:
        """Map the arrays into memory and return the checksums; ValueError when they cannot lie as the header says."""
        content, end = np.asarray(np.memmap(self.path, np.uint8, "r")), begin
        for name, entry in header.items():
            dtype, shape, first = NUMPY[entry["dtype"]], entry["shape"], end
            end += dtype.itemsize * math.prod(shape)
            if min(shape) < 0 or entry["data_offsets"] != [first - begin, end - begin]:
                raise ValueError(name)
            unit, _, array = name.rpartition("/")
            self.units.setdefault(unit, {})[array] = content[first:end].view(dtype).reshape(shape)
        checksums = self.units.pop("")["checksums"]
        if end != len(content) or len(checksums) != len(self.units):
            raise ValueError("it is longer than that, or units have no checksum")
        return checksums


def growing_path(path: Path) -> Path:
    """Return where a file lies while it is filled: beside the output."""
    return path.with_name(f"{path.stem}.growing{path.suffix}")


def _bytes(values: Array) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _checksum(unit: str, arrays: Iterable[Array]) -> int:
    """Return the CRC-32 of a unit's name and values; never 0, which is what a hole reads as."""
    checksum = zlib.crc32(unit.encode())
    for values in arrays:
        checksum = zlib.crc32(_bytes(values), checksum)
    return checksum or 1
