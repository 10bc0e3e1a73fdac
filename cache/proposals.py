"""Proposals on disk: an HDF5 file keyed by image id, written as a stream and read image by image.

    image_ids  [N]       UTF-8 text
    offsets    [N + 1]   int64: image n owns the rows offsets[n] .. offsets[n + 1] of the next two
    boxes      [K, 4]    float32: continuous x1, y1, x2, y2 in pixels of the original image
    scores     [K]       float32

Attributes, all text but the version: "format_version", and what the proposals were made from, "dataset" and "model"
(digests) and "settings" (JSON). Only image_ids, offsets, boxes and scores are required of a file of other origin.
h5py is imported when a file is opened: it takes longer than most commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from altopt.errors import ArtifactError
from cache.files import DeferringFile, atomic_path, canonical_json, file_error

if TYPE_CHECKING:
    import h5py

FORMAT_VERSION = 1
CHUNK_ROWS = 4096
CHECK_ROWS = 1 << 16
EDGE_PIXELS = 1.0  # a resized image has whole pixels, so a box clipped to it may end a little outside the original
DEFLATE_LIMIT = 1100  # a byte of deflate stands for at most 1032; what claims to hold more was never written
REMEDY = 'make it again ("altopt plan" says how), or bring a file of the schema in cache/proposals.py'


# name: the type of the values (str: text), the shape of a row, and both in words
SCHEMA: dict[str, tuple[type, tuple[int, ...], str]] = {
    "image_ids": (str, (), "text [N]"), "offsets": (np.int64, (), "int64 [N + 1]"),
    "boxes": (np.float32, (4,), "float32 [K, 4]"), "scores": (np.float32, (), "float32 [K]"),
}

Boxes = NDArray[np.float32]
Scores = NDArray[np.float32]


class ProposalWriter:
    """Writes proposals image by image, in flat memory; the file appears when the ``with`` block ends well.

    ``attributes`` are text, apart from "settings", a JSON-able mapping. The same content and attributes give the same
    bytes. Raises ResourceError when there is no room.
    """

    def __init__(self, path: Path, attributes: Mapping[str, object]) -> None:
        self._path = path
        settings = canonical_json(attributes.get("settings", {}))
        self._attributes = {**{name: str(value) for name, value in attributes.items()}, "settings": settings}
        self._ids: dict[str, None] = {}
        self._offsets = [0]
        self._waiting: list[tuple[Boxes, Scores]] = []
        self._waiting_rows = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ProposalWriter:
        import h5py

        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            self._output = stack.enter_context(DeferringFile(temporary, "w+"))
            stack.callback(self._raise_full)
            self._file = stack.enter_context(h5py.File(self._output, "w", libver=("earliest", "v110")))
            for name in ("boxes", "scores"):
                dtype, shape, _ = SCHEMA[name]
                self._file.create_dataset(
                    name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(CHUNK_ROWS, *shape))
            self._stack = stack.pop_all()
        return self

    def append(self, image_id: str, boxes: ArrayLike, scores: ArrayLike) -> None:
        """Add one image: boxes [K, 4] in pixels of the original image, best first, and scores [K]; K may be 0.

        Raises ValueError for an image that was added before and for arrays that do not belong together.
        """
        boxes = np.asarray(boxes, np.float32)  # (K, 4)
        scores = np.asarray(scores, np.float32)  # (K,)
        if boxes.shape != (len(scores), 4) or scores.ndim != 1:
            raise ValueError(f"{image_id}: boxes {boxes.shape} and scores {scores.shape}, not [K, 4] and [K]")
        if image_id in self._ids:
            raise ValueError(f"{image_id} was added before")
        self._ids[image_id] = None
        self._offsets.append(self._offsets[-1] + len(scores))
        self._waiting.append((boxes.copy(), scores.copy()))
        self._waiting_rows += len(scores)
        if self._waiting_rows >= CHUNK_ROWS:
            self._write_rows(self._waiting_rows // CHUNK_ROWS * CHUNK_ROWS)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if error:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            self._write_rows(self._waiting_rows)
            self._file["offsets"] = np.asarray(self._offsets, np.int64)
            ids = [image_id.encode() for image_id in self._ids]
            self._file["image_ids"] = np.asarray(ids, _text(ids))
            for name, value in sorted(self._attributes.items()):
                self._file.attrs.create(name, value.encode(), dtype=_text([value.encode()]))
            self._file.attrs["format_version"] = FORMAT_VERSION

    def _write_rows(self, rows: int) -> None:
        """Move ``rows`` rows from memory to the file: whole chunks, so that none is written twice, but for the last."""
        boxes = np.concatenate([boxes for boxes, _ in self._waiting] or [np.empty((0, 4), np.float32)])
        scores = np.concatenate([scores for _, scores in self._waiting] or [np.empty(0, np.float32)])
        for name, values in {"boxes": boxes, "scores": scores}.items():
            dataset = self._file[name]
            begin = len(dataset)
            dataset.resize(begin + rows, axis=0)
            dataset[begin:] = values[:rows]
        self._waiting = [(boxes[rows:], scores[rows:])]
        self._waiting_rows -= rows
        self._raise_full()

    def _raise_full(self) -> None:
        if self._output.error:
            raise file_error(self._path, self._output.error, "written") from self._output.error


class ProposalFile:
    """Reads proposals by image id; ArtifactError for a missing or corrupt file, or anything but the plain schema."""
    # One open file for each object and process: it may be shared by threads, sent to workers and survive a fork.

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open_file: tuple[int, h5py.File] | None = None
        self._columns: dict[str, h5py.Dataset] = {}  # kept: to look one up costs as much as to read it
        with self._reading() as file:
            self._identity = _identity(path)
            self._check_layout(file)
            self._rows = len(file["scores"])
            version = file.attrs.get("format_version", FORMAT_VERSION)
            if version != FORMAT_VERSION:
                raise self._error(f"its format version is {version}, this altopt reads {FORMAT_VERSION}")
            self.attributes: dict[str, object] = {
                name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                for name, value in file.attrs.items() if isinstance(value, str | bytes)}
            try:
                self.attributes["settings"] = json.loads(str(self.attributes.get("settings", "{}")))
            except ValueError as error:
                raise self._error("its attribute settings is not JSON") from error
            try:
                self.image_ids: tuple[str, ...] = tuple(file["image_ids"].asstr("utf-8", "strict")[:].tolist())
            except UnicodeDecodeError as error:
                raise self._error("image_ids is not UTF-8 text") from error
            self._offsets: NDArray[np.int64] = file["offsets"][:]  # (N + 1,)
        offsets, count = self._offsets, len(self.image_ids)
        self._index = dict(zip(self.image_ids, range(count), strict=True))
        if len(self._index) != count:
            raise self._error("image_ids names an image twice")
        if len(offsets) != count + 1:
            raise self._error(f"offsets has {len(offsets)} entries for {count} images, not {count + 1}")
        if offsets[0] != 0 or offsets[-1] != self._rows or (np.diff(offsets) < 0).any():
            raise self._error(f"offsets does not rise from 0 to the {self._rows} rows")

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many proposals each image has, in the order of ``image_ids``: int64 [N]."""
        return np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._index

    def get(self, image_id: str) -> tuple[Boxes, Scores]:
        """Return boxes float32 [K, 4] in pixels of the original image and scores float32 [K] of one image."""
        if image_id not in self._index:
            raise self._missing(image_id)
        number = self._index[image_id]
        return self._read(slice(self._offsets[number], self._offsets[number + 1]))

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Check every row, in flat memory, against the images' sizes (width, height).

        Raises ArtifactError when an image of ``sizes`` has no entry, and for the first box that is not finite, ends
        before it begins or lies outside its image, and the first score that is not finite. Other images may be in
        the file; their boxes need only be boxes.
        """
        if missing := [image_id for image_id in sizes if image_id not in self._index]:
            raise self._missing(missing[0])
        unknown = (np.inf, np.inf)
        limits = np.array([sizes.get(image_id, unknown) for image_id in self.image_ids], np.float64).reshape(-1, 2)
        for begin in range(0, self._rows, CHECK_ROWS):
            rows = np.arange(begin, min(begin + CHECK_ROWS, self._rows))
            owners = np.searchsorted(self._offsets, rows, side="right") - 1  # the image of each row
            boxes, scores = self._read(slice(rows[0], rows[-1] + 1))
            start, end = boxes[:, :2], boxes[:, 2:]  # (K, 2) each
            broken = {
                "is not finite": ~(np.isfinite(boxes).all(1) & np.isfinite(scores)),
                "ends before it begins (x1, y1, x2, y2 are expected)": (end < start).any(1),
                "lies outside its image": ((start < -EDGE_PIXELS) | (end > limits[owners] + EDGE_PIXELS)).any(1),
            }
            for rule, where in broken.items():
                if where.any():
                    row = int(where.argmax())
                    box = ", ".join(f"{value:g}" for value in boxes[row])
                    raise self._error(
                        f"image {self.image_ids[owners[row]]}: box ({box}) with score {scores[row]:g} {rule}",
                        "make it again, in pixels of the original image")

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        with _lock:
            self._close()

    def __enter__(self) -> ProposalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open_file": None, "_columns": {}}

    def _read(self, rows: slice) -> tuple[Boxes, Scores]:
        with self._reading() as file:
            if not self._columns:
                self._columns = {name: file[name] for name in ("boxes", "scores")}
            return self._columns["boxes"][rows], self._columns["scores"][rows]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[h5py.File]:
        import h5py

        with _lock:
            try:
                if self._open_file is None or self._open_file[0] != os.getpid():
                    # A handle from before a fork is closed: HDF5 would go on with it, not open the file again.
                    self._close()
                    if hasattr(self, "_identity") and _identity(self.path) != self._identity:
                        raise self._error("it was replaced while it was in use", "run the same command again")
                    self._open_file = os.getpid(), h5py.File(self.path, "r", locking=False)
                yield self._open_file[1]
            except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py on a damaged file
                if isinstance(error, OSError) and error.errno is not None:
                    raise file_error(self.path, error, "read") from error
                raise self._error("it is not an HDF5 file, or damaged") from error

    def _close(self) -> None:
        if self._open_file is not None:
            self._open_file[1].close()
        self._open_file, self._columns = None, {}

    def _missing(self, image_id: str) -> ArtifactError:
        return self._error(f"it has no entry for image {image_id}", "make it for this data set")

    def _error(self, cause: str, remedy: str = REMEDY) -> ArtifactError:
        return ArtifactError(f"{self.path} cannot be used: {cause}: {remedy}")

    def _check_layout(self, file: h5py.File) -> None:
        """Refuse everything but plain data sets of the right type; what HDF5 can do beyond them reaches other files."""
        import h5py

        for name, (dtype, shape, words) in SCHEMA.items():
            link = file.get(name, getlink=True)
            if link is None:
                raise self._error(f"it has no data set {name}")
            if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
                raise self._error(f"{name} is a link or a group, not a data set")
            dataset, properties = file[name], file[name].id.get_create_plist()
            if (properties.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED)
                    or properties.get_external_count()):
                raise self._error(f"{name} is neither contiguous nor chunked, or lies outside the file")
            filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
            if not {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}.issuperset(filters):
                raise self._error(f"{name} is compressed by other means than gzip")
            if dataset.nbytes > DEFLATE_LIMIT * dataset.id.get_storage_size():
                raise self._error(f"{name} was never written, or not to the end")
            right = h5py.check_string_dtype(dataset.dtype) if dtype is str else dataset.dtype == dtype
            if not right or dataset.ndim != 1 + len(shape) or dataset.shape[1:] != shape:
                raise self._error(f"{name} is {dataset.dtype} {list(dataset.shape)}, not {words}")
        if len(file["boxes"]) != len(file["scores"]):
            raise self._error(f"it has {len(file['boxes'])} boxes and {len(file['scores'])} scores")



def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _text(texts: list[bytes]) -> np.dtype[np.bytes_]:
    """Return a dtype of fixed width: HDF5 keeps text of variable width in a heap, which need not repeat its bytes."""
    import h5py

    return cast("np.dtype[np.bytes_]", h5py.string_dtype("utf-8", max([1, *map(len, texts)])))


_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock  # the parent's may have been taken at the moment of the fork
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
