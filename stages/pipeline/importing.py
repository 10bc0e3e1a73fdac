"""Proposals of one's own in, a run's out: files of any known format, looked at and measured on the way in."""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from altopt.datasets.dataset import IMAGE_SUFFIXES, Dataset
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, UsageError
from altopt.evaluation.recall import LIMITS, proposal_recall
from altopt.proposal_formats.json_files import read_json, write_json
from altopt.proposal_formats.pickles import read_pickle, write_detectron2, write_py_faster_rcnn
from altopt.proposal_formats.plausibility import Plausibility
from altopt.proposal_formats.reader import BOX_FORMATS, Boxes, BoxFormat, ProposalFileReader, RawProposals, Scores
from altopt.proposal_formats.selective_search_mat import read_mat
from cache.files import atomic_path, digest_files, sha256_file
from cache.proposals import ProposalFile, ProposalWriter
from stages.pipeline.evaluation import ProposalRecall
from stages.pipeline.run import Run
from stages.shared.events import Caution, Note
from stages.shared.step import split_of

Reader = Callable[[Path, tuple[str, ...]], ProposalFileReader]
FORMATS = ("hdf5", "json", "detectron2", "py-faster-rcnn")
BY_SUFFIX = {".h5": "hdf5", ".hdf5": "hdf5", ".json": "json"}
WRITERS: dict[str, Callable[[IO[bytes], Iterator[tuple[str, Boxes, Scores]]], None]] = {
    "json": write_json, "detectron2": write_detectron2, "py-faster-rcnn": write_py_faster_rcnn}
NAMED = 3  # images that a message names
SHOWN = (0, 2, 4, 6, 8)  # of the thresholds: IoU 0.5, 0.6, ... 0.9


class Imported(ProposalRecall):
    """What was found in a file of proposals: images that the data set does not have, or the file does not, and more."""

    artifact: str
    file: str
    format: str
    box_format: str
    boxes: int
    boxes_left_out: int
    images_foreign: int
    images_missing: int
    images_without_scores: int


def read_hdf5(path: Path, ids: tuple[str, ...]) -> ProposalFileReader:
    """Return the proposals of an HDF5 file of the schema in cache/proposals.py."""
    def images() -> Iterator[RawProposals]:
        with ProposalFile(path) as file:
            for image_id in file.image_ids:
                yield image_id, *file.get(image_id)

    return ProposalFileReader(path, "altopt's HDF5", "xyxy", images())


READERS: dict[str, Reader] = {".h5": read_hdf5, ".hdf5": read_hdf5, ".mat": read_mat, ".pkl": read_pickle,
                              ".pickle": read_pickle, ".json": read_json}


def open_split(run: Run, artifact: str) -> Dataset:
    """Return the split of the run's data set that an artifact is about."""
    return open_dataset(run.recipe.data, split_of(artifact), run.runtime.data_root)


def read_proposals(path: Path, ids: tuple[str, ...], box_format: BoxFormat | None = None) -> ProposalFileReader:
    """Return the proposals of a file of any known format, by its suffix; ``box_format`` overrules the format's own."""
    if not path.exists():
        raise ArtifactError(f"{path} is not there: check the path")
    reader = read_mat if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path} is of no known format: it must end in one of {', '.join(READERS)}, or be a folder "
                         "of .mat files")
    incoming = reader(path, ids)
    incoming.box_format = box_format or incoming.box_format
    return incoming


def import_proposals(run: Run, source: Path, artifact: str, *, box_format: BoxFormat | None = None,
                     allow_missing: bool = False, invalid: Literal["error", "leave-out"] = "error") -> Imported:
    """Make the proposals of ``source`` the run's artifact, given from outside; return what was found.

    The recall and what looks wrong are reported before anything is written. Raises ArtifactError for images without
    an entry (unless ``allow_missing``: they get no proposals), and for boxes that cannot be used (unless ``invalid``
    is "leave-out").
    """
    dataset = open_split(run, artifact)
    incoming = read_proposals(source, dataset.ids, box_format)
    attributes = {"dataset": digest_files(dataset.files(), dataset.description(), run.memo, run.runtime.data_root),
                  "source": source.name, "settings": {"format": incoming.form, "box_format": incoming.box_format}}
    if source.is_file():
        attributes["source_sha256"] = sha256_file(source)
    # An error on the way leaves the artifact that was there.
    with ProposalWriter(run.path(artifact), attributes) as writer:
        importer = ProposalImporter(dataset, incoming, writer, allow_missing)
        recall = proposal_recall(importer.images(), LIMITS)
        shares = "  ".join(f"{0.5 + 0.05 * index:.1f}: {recall.at(max(LIMITS))[index]:.3f}" for index in SHOWN)
        run.runtime.report(Note(f"recall on {dataset.name} at IoU {shares} (up to {max(LIMITS)} proposals)"))
        remarks = importer.plausibility.warnings()
        if importer.foreign:
            remarks.append(f"{len(importer.foreign)} images of the file are not in {dataset.name} and are left out: "
                           f"{_some(importer.foreign)}")
        if importer.missing:
            remarks.append(f"{len(importer.missing)} images get no proposals: {_some(importer.missing)}")
        if incoming.unscored:
            remarks.append(f"{incoming.unscored} images have no scores: the order of their boxes stands for them")
        for text in remarks:
            run.runtime.report(Caution(text))
        if invalid == "error" and (problem := importer.plausibility.problem()):
            raise ArtifactError(f"{source} is not imported: {problem}: say how its boxes count with --box-format "
                                f"({', '.join(BOX_FORMATS)}), or do without such boxes with --invalid leave-out")
    run.import_artifact(artifact, None, f"imported from {source.name}, {incoming.form}, read as {incoming.box_format}")
    return {"artifact": artifact, "file": str(run.path(artifact)), "format": incoming.form,
            "box_format": incoming.box_format, "proposals": run.path(artifact).name, "split": dataset.name,
            "boxes": importer.kept, "boxes_left_out": importer.left_out, "images_foreign": len(importer.foreign),
            "images_missing": len(importer.missing), "images_without_scores": incoming.unscored, **recall.as_dict()}


class ProposalImporter:
    """Where the images of a file are matched with those of a data set, their boxes looked at, and both written."""

    def __init__(self, dataset: Dataset, incoming: ProposalFileReader, writer: ProposalWriter,
                 allow_missing: bool) -> None:
        self.dataset, self.incoming, self.writer, self.allow_missing = dataset, incoming, writer, allow_missing
        self.plausibility = Plausibility(incoming.box_format)
        self.foreign: list[str] = []
        self.missing: list[str] = []
        self.left_out = 0
        self.kept = 0

    def images(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Write image by image, and give the objects to be found and the proposals of each."""
        # A file names an image by the data set's id or by the one that it bears in COCO json.
        names = {str(self.dataset.coco_image_id(id)): id for id in self.dataset.ids}
        names |= {id: id for id in self.dataset.ids}
        seen: set[str] = set()
        for name, boxes, scores in self.incoming:
            path = PurePosixPath(name)  # or by its file, with folder and suffix
            short = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
            image_id = names.get(name) or names.get(short)
            if image_id is None:
                self.foreign.append(name)
                continue
            if image_id in seen:
                raise ArtifactError(f"{self.incoming.path} has two entries for image {image_id}: join them")
            seen.add(image_id)
            usable = self.plausibility.usable(image_id, boxes, scores, self.dataset.size(image_id))
            objects = self._objects(image_id)
            self.plausibility.try_readings(objects, boxes)
            self.writer.append(image_id, boxes[usable], scores[usable])
            self.kept += int(usable.sum())
            self.left_out += int((~usable).sum())
            yield objects, boxes[usable]
        self.missing = [image_id for image_id in self.dataset.ids if image_id not in seen]
        if self.missing and not self.allow_missing:
            foreign = f" (it names {_some(self.foreign)}, which are not)" if self.foreign else ""
            share = f"{len(self.missing)} of {len(self.dataset.ids)} images"
            raise ArtifactError(f"{self.incoming.path} has no entry for {share} of {self.dataset.name}, such as "
                                f"{_some(self.missing)}{foreign}: bring a file of this split, or give them no "
                                "proposals with --allow-missing")
        none = np.empty((0, 4), np.float32)
        for image_id in self.missing:
            self.writer.append(image_id, none, none[:, 0])
            yield self._objects(image_id), none

    def _objects(self, image_id: str) -> NDArray[np.float32]:
        objects = self.dataset.objects(image_id)
        return objects.usable().boxes


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def export_proposals(run: Run, artifact: str, target: Path, form: str | None = None) -> dict[str, str | int]:
    """Write a run's proposals to ``target``; the format is told by the suffix unless it is named."""
    # A list for py-faster-rcnn has no image ids and goes by the data set's order, so the data set must be there.
    split_of(artifact)  # which is to be a name of proposals
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
