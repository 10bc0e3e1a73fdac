"""Detecting on the test split with the networks of a run: its settings, and how it is done batch by batch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from altopt.config import DetectionSettings, setting
from altopt.datasets.dataset import Dataset
from stages.shared.stage_config import OnTestSplit
from stages.shared.step import Runtime

if TYPE_CHECKING:
    import numpy as np

    from altopt.batches.samples import Batch
    from altopt.evaluation.detections import Detections
    from altopt.models.detector import FasterRCNN
    from stages.shared.training import CachedProposals


@dataclass(frozen=True, kw_only=True)
class Detect(DetectionSettings, OnTestSplit):
    """How images of the test split are detected on."""

    table: ClassVar[str] = "detect"
    images_per_batch: int = setting(1, "py-faster-rcnn test_net: one image at a time", at_least=1)


def detect_split(checkpoints: list[tuple[Path, tuple[str, ...]]], out: Path, config: Detect, runtime: Runtime,
                 proposals: Path | None = None) -> dict[str, Any]:
    """Detect on the test split, on an RPN's proposals or those of a file, and return facts for the record.

    ``checkpoints`` are networks with the parts that are used of each: one that does both, or an RPN and a detector.
    """
    import time

    import torch

    from altopt.evaluation.detections import Detections, to_coco_results
    from altopt.evaluation.ground_truth import counted
    from altopt.evaluation.recall import proposal_recall
    from cache.files import write_json_atomic
    from stages.shared.inference import Inference
    from stages.shared.training import CachedProposals

    inference = Inference(checkpoints, config, runtime, split="test")
    rpn, detector = inference.networks[0], inference.networks[-1]
    dataset = inference.dataset
    cached = CachedProposals(proposals, dataset, config.proposals) if proposals else None
    found: dict[str, Detections] = {}
    covered = []
    seconds = 0.0

    def compute(batch: Any) -> tuple[list[Any], float]:
        started = time.perf_counter()
        with torch.inference_mode(), inference.autocast():
            made = detected(rpn, detector, batch, dataset, config, cached)
        return made, time.perf_counter() - started

    for made, took in inference.results(config.images_per_batch, compute):
        for id, detections, proposed in made:
            found[id] = detections
            objects = dataset.objects(id)
            covered.append((objects.boxes[counted(objects)], proposed))
        seconds += took
    if not runtime.ranks.first:
        return {}
    write_json_atomic(out, to_coco_results(found, dataset.category_ids, dataset.coco_image_id))
    recall = proposal_recall(covered, (config.proposals,))
    return {"seconds_per_image": round(seconds / max(len(found), 1), 5),
            "recall_at_0.5": float(recall.at(config.proposals)[0]), "average_recall": recall.average(config.proposals)}


def detected(rpn: "FasterRCNN", detector: "FasterRCNN", batch: "Batch", dataset: Dataset, config: Detect,
             cached: "CachedProposals | None" = None) -> "list[tuple[str, Detections, np.ndarray]]":
    """Return each image's id, detections, and the proposals they come from, float32 [K, 4]; in the original frame.

    The proposals are the RPN's own, or cached ones. The RPN and the detector may be one network.
    """
    from altopt.batches.samples import boxes_in_input, to_original
    from altopt.evaluation.detections import Detections
    from altopt.models.detector import detect_on, own_proposals, propose

    features = rpn.conv(batch.images)
    if cached:
        rois = [boxes_in_input(cached.get(sample.id), sample).to(features.device) for sample in batch.samples]
    else:
        rois = [boxes for boxes, _ in propose(rpn, features, batch, own_proposals(config))]
    if detector is not rpn:
        features = detector.conv(batch.images)
    results = detect_on(detector, features, batch, rois, config)
    made = []
    for sample, own, result in zip(batch.samples, rois, results, strict=True):
        size = dataset.size(sample.id)
        boxes, scores, labels = (each.cpu().numpy() for each in (to_original(result[0], sample, size), *result[1:]))
        made.append((sample.id, Detections(boxes, scores, labels), to_original(own, sample, size).cpu().numpy()))
    return made
