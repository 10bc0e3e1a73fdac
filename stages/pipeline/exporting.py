"""Proposals for other programs: a run's file as HDF5, json, or the pickles of detectron2 and py-faster-rcnn."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from altopt.errors import ArtifactError, UsageError
from altopt.proposal_formats.json_files import write_json
from altopt.proposal_formats.pickles import write_detectron2, write_py_faster_rcnn
from altopt.proposal_formats.reader import Boxes, Scores
from cache.files import atomic_path
from cache.proposals import ProposalFile
from stages.pipeline.importing import open_split
from stages.pipeline.run import Run
from stages.shared.step import split_of

FORMATS = ("hdf5", "json", "detectron2", "py-faster-rcnn")
BY_SUFFIX = {".h5": "hdf5", ".hdf5": "hdf5", ".json": "json"}
WRITERS: dict[str, Callable[[IO[bytes], Iterator[tuple[str, Boxes, Scores]]], None]] = {
    "json": write_json, "detectron2": write_detectron2, "py-faster-rcnn": write_py_faster_rcnn,
}


def export_proposals(run: Run, artifact: str, target: Path, form: str | None = None) -> dict[str, str | int]:
    """Write a run's proposals to ``target``; the format is told by the suffix unless it is named.

    A list for py-faster-rcnn has no image ids and goes by the data set's order, so the data set must be there.
    """
    split_of(artifact)
    path = run.path(artifact)
    if not path.is_file():
        raise ArtifactError(f"{path.name} is not in {run.folder}: make it first, or name other proposals")
    chosen = form or BY_SUFFIX.get(target.suffix.lower())
    if chosen is None:
        raise UsageError(f"{target} does not tell its format: name it with --format {'|'.join(FORMATS)}")
    with ProposalFile(path) as file, atomic_path(target) as temporary:
        if chosen == "hdf5":
            temporary.write_bytes(path.read_bytes())
        else:
            ids = open_split(run, artifact).ids if chosen == "py-faster-rcnn" else file.image_ids
            with temporary.open("wb") as output:
                WRITERS[chosen](output, ((image_id, *file.get(image_id)) for image_id in ids))
        return {"artifact": artifact, "file": str(target), "format": chosen, "images": len(file)}
