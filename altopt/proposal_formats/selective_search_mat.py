"""Selective search's boxes in MATLAB files: a whole split as fast-rcnn ships it, or an image in each file.

A whole split has the cells ``boxes`` and ``images`` (without: the split's order), boxes y1 x1 y2 x2 counted from 1.
The file of one image has the matrix ``boxes``, x1 y1 x2 y2 counted from 0, as fast-rcnn's demo has them; it is named
after the image, and a folder of them stands for a split. ``scores`` may be there too, of the same form.
MATLAB's version 7.3 is HDF5 and read image by image; older ones need scipy, which reads them whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from altopt.errors import ArtifactError, UsageError
from altopt.proposal_formats.reader import ProposalFileReader, RawProposals, in_order

ONE = "a selective-search .mat of one image"
WHOLE = "a selective-search .mat of a whole split"
NAMES = ("boxes", "images", "scores")
REMEDY = "save it again in MATLAB with -v7 or -v7.3"


def read_mat(path: Path, ids: tuple[str, ...]) -> ProposalFileReader:
    """Return the proposals of a .mat file, or of a folder of them; ``ids`` is the split's order.

    Raises ArtifactError for a file of another content, UsageError where scipy is needed and missing.
    """
    if path.is_dir():
        files = sorted(path.glob("*.mat"))
        if not files:
            raise ArtifactError(f"{path} holds no .mat file: name the folder that has one for each image")
        return ProposalFileReader(path, f"{ONE} each", "inclusive-0", map(_one_image, files))
    if h5py.is_hdf5(path):
        return _version_73(path, ids)
    content = _version_5(path)
    if content["boxes"].dtype != object:
        return ProposalFileReader(path, ONE, "inclusive-0", [_raw(path, content)])
    cells = content["boxes"].ravel()
    names = [_text(cell) for cell in content["images"].ravel()] if "images" in content else None
    scores = content["scores"].ravel() if "scores" in content else [None] * len(cells)
    return ProposalFileReader(path, WHOLE, "yxyx-inclusive-1",
                              zip(_ids(path, len(cells), names, ids), cells, scores, strict=True))


def _ids(path: Path, count: int, names: list[str] | None, ids: tuple[str, ...]) -> tuple[str, ...]:
    if names is None:
        return in_order(path, count, ids)
    if len(names) != count:
        raise ArtifactError(f"{path} has {count} boxes and {len(names)} images in its cells: {REMEDY}")
    return tuple(names)


def _one_image(path: Path) -> RawProposals:
    if h5py.is_hdf5(path):
        with _opened(path) as file:
            return _raw_of_73(path, file)
    return _raw(path, _version_5(path))


def _raw(path: Path, content: dict[str, NDArray[np.generic]]) -> RawProposals:
    return path.stem.removesuffix("_boxes"), content["boxes"], content.get("scores")


def _version_5(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise UsageError(f"{path} needs scipy to be read: install it with pip install -e '.[proposals]', or save the "
                         "file with -v7.3 in MATLAB, which needs none") from None
    try:
        content: dict[str, NDArray[np.generic]] = loadmat(path, variable_names=NAMES)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error}): check the path") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can lead to any
        cause = " ".join(str(error).split())
        raise ArtifactError(f"{path} is not a MATLAB file, or is damaged ({cause}): {REMEDY}") from error
    if not isinstance(content.get("boxes"), np.ndarray):
        raise _without_boxes(path)
    return {name: content[name] for name in NAMES if name in content}


def _text(cell: object) -> str:
    while isinstance(cell, np.ndarray) and cell.size:  # a cell in a cell, as saving from a program nests them
        cell = cell.ravel()[0]
    return str(cell)


def _version_73(path: Path, ids: tuple[str, ...]) -> ProposalFileReader:
    with _opened(path) as file:
        boxes = _variable(path, file, "boxes")
        if boxes.dtype.kind != "O":
            return ProposalFileReader(path, ONE, "inclusive-0", [_raw_of_73(path, file)])
        names = None
        if "images" in file:  # a text is stored as the numbers of its characters
            cells = [_plain(path, file[cell])[()] for cell in _cells(path, file, "images")]
            names = ["".join(map(chr, cell.ravel().tolist())) for cell in cells]
        own = _ids(path, boxes.size, names, ids)
        return ProposalFileReader(path, WHOLE, "yxyx-inclusive-1", _cells_of_73(path, own))


def _raw_of_73(path: Path, file: h5py.File) -> RawProposals:
    names = ["boxes", *({"scores"} & file.keys())]
    return _raw(path, {name: _matrix(path, _variable(path, file, name)) for name in names})


def _cells_of_73(path: Path, ids: tuple[str, ...]) -> Iterator[RawProposals]:
    with _opened(path) as file:
        scores = _cells(path, file, "scores") if "scores" in file else [None] * len(ids)
        for image_id, box_cell, score_cell in zip(ids, _cells(path, file, "boxes"), scores, strict=True):
            raw_scores = None if score_cell is None else _matrix(path, file[score_cell])
            yield image_id, _matrix(path, file[box_cell]), raw_scores


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py on a damaged file
        raise ArtifactError(f"{path} is damaged ({' '.join(str(error).split())}): {REMEDY}") from error


def _variable(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
        raise _without_boxes(path)
    return _plain(path, file[name])


def _cells(path: Path, file: h5py.File, name: str) -> NDArray[np.object_]:
    # MATLAB goes down the columns; HDF5 stores its axes the other way, so that here rows give MATLAB's order.
    references: NDArray[np.object_] = _variable(path, file, name)[()].ravel()
    return references


def _plain(path: Path, dataset: h5py.Dataset) -> h5py.Dataset:
    # What comes from elsewhere must not make us read other files.
    if dataset.external or dataset.is_virtual:
        raise ArtifactError(f"{path}: {dataset.name} lies in another file: {REMEDY}")
    return dataset


def _matrix(path: Path, dataset: h5py.Dataset) -> NDArray[np.generic]:
    values = _plain(path, dataset)[()]
    return np.empty((0, 4)) if "MATLAB_empty" in dataset.attrs else values.T  # an empty one is stored as its extents


def _without_boxes(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} has no variable boxes: name the file that holds selective search's boxes")
