"""Detecting on the test split with the networks of a run: its settings, and how it is done batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from altopt.config import DetectionSettings, setting
from stages.shared.stage_config import PARTS, OnTestSplit, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from altopt.batches.samples import Batch
    from altopt.models.detector import FasterRCNN
    from stages.shared.inference import Detected
    from stages.shared.training import CachedProposals


@dataclass(frozen=True, kw_only=True)
class Detect(DetectionSettings, OnTestSplit):
    """How images of the test split are detected on."""

    table: ClassVar[str] = "detect"
    images_per_batch: int = setting(1, "py-faster-rcnn test_net: one image at a time", at_least=1)

    @property
    def work(self) -> Work:
        """A batch of images and all their proposals through all."""
        return Work(PARTS, self.images_per_batch, self.images_per_batch * self.proposals)


def detect_split(checkpoints: list[tuple[Path, tuple[str, ...]]], out: Path, config: Detect, runtime: Runtime,
                 proposals: Path | None = None) -> Facts:
    """Detect on the test split, on an RPN's proposals or those of a file, and return facts for the record.

    ``checkpoints`` are networks with the parts that are used of each: one that does both, or an RPN and a detector.
    """
    from altopt.batches.samples import Sample, make_batch, read_sample
    from stages.shared.inference import Inference, write_detections
    from stages.shared.training import CachedProposals

    inference = Inference(checkpoints, config, runtime)
    rpn, detector = inference.networks[0], inference.networks[-1]
    dataset = inference.dataset
    cached = CachedProposals(proposals, dataset, config.proposals) if proposals else None

    def read(ids: list[str]) -> list[Sample]:
        return [read_sample(dataset, id, config.network) for id in ids]

    def detect(ids: list[str], samples: list[Sample]) -> "list[Detected]":
        with inference.autocast():
            batch = make_batch(samples, inference.device, pixels=rpn.pixels)
            return detected(rpn, detector, batch, [dataset.size(id) for id in ids], config, cached)

    groups = inference.groups(config.images_per_batch)
    return write_detections(inference, groups, read, detect, out, config.proposals)


def detected(rpn: "FasterRCNN", detector: "FasterRCNN", batch: "Batch", sizes: Sequence[tuple[int, int]],
             settings: DetectionSettings, cached: "CachedProposals | None" = None) -> "list[Detected]":
    """Return what is found in each image, in the original frame, on the RPN's own proposals or on cached ones.

    ``sizes`` are (width, height) of the images in the original frame.
    """
    from altopt.batches.samples import boxes_in_input, to_original
    from altopt.evaluation.detections import Detections
    from altopt.models.detector import detect_on, own_proposals, propose
    from stages.shared.inference import Detected

    features = rpn.conv(batch.images)  # (B, C, H, W)
    if cached:
        rois = [boxes_in_input(cached.get(sample.id), sample).to(features.device) for sample in batch.samples]
    else:
        rois = [boxes for boxes, _ in propose(rpn, features, batch, own_proposals(settings))]
    if detector is not rpn:
        features = detector.conv(batch.images)  # (B, C, H, W)
    made = []
    results = detect_on(detector, features, batch, rois, settings)
    for sample, size, own, (boxes, scores, labels) in zip(batch.samples, sizes, rois, results, strict=True):
        detections = Detections(to_original(boxes, sample, size).cpu().numpy(), scores.cpu().numpy(),
                                labels.cpu().numpy())
        made.append(Detected(sample.id, detections, to_original(own, sample, size).cpu().numpy()))
    return made
