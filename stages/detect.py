"""Detection on the test split, for evaluation: by one network, or by an RPN and a Fast R-CNN that share nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from altopt.config import DetectionRule, sourced
from altopt.datasets.dataset import Dataset
from stages.split_config import OnTestSplit
from stages.step import Runtime

if TYPE_CHECKING:
    import numpy as np

    from altopt.detector import FasterRCNN
    from altopt.evaluation.detections import Detections
    from altopt.pictures import Batch
    from stages.training import CachedProposals


@dataclass(frozen=True, kw_only=True)
class Detect(DetectionRule, OnTestSplit):
    """How pictures of the test split are detected on."""

    version: ClassVar[int] = 1
    table: ClassVar[str] = "detect"
    images_per_batch: int = sourced(1, "pfr test_net: one picture at a time")


@dataclass(frozen=True, kw_only=True)
class DetectOnProposals(Detect):
    """The same, with proposals from a file in place of an RPN's."""

    table: ClassVar[str] = "detect_on_proposals"
    proposals: int = sourced(2000, "Fast R-CNN, section 2: about 2000 of selective search")
    scales: tuple[int, ...] = sourced((), "the network's short_side alone; five: 480, 576, 688, 864, 1200")
    max_side: int = sourced(2000, "Fast R-CNN's config for five scales; one scale has the network's")
    region_area: int = sourced(224 * 224, "SPP-net, section 4.1: where the scale is chosen by region")
    rois_at_once: int = sourced(512, "chosen: bounds the memory where there are several scales")


def detect_shared(detector: Path, *, out: Path, config: Detect, runtime: Runtime) -> dict[str, Any]:
    """Detect on the test split with one network, RPN and Fast R-CNN on the same conv layers."""
    return _detect([(detector, ("conv", "rpn", "fc", "head"))], out, config, runtime)


def detect_unshared(rpn: Path, detector: Path, *, out: Path, config: Detect, runtime: Runtime) -> dict[str, Any]:
    """Detect on the test split with a Fast R-CNN on the proposals of a separate RPN."""
    return _detect([(rpn, ("conv", "rpn")), (detector, ("conv", "fc", "head"))], out, config, runtime)


def detect_on_proposals(detector: Path, proposals: Path, *, out: Path, config: DetectOnProposals,
                        runtime: Runtime) -> dict[str, Any]:
    """Detect on the test split with a Fast R-CNN on proposals of other origin, the best of each picture."""
    if config.scales:
        from stages.fast_rcnn_regions import detect_at_scales

        return detect_at_scales(detector, proposals, out, config, runtime)
    return _detect([(detector, ("conv", "fc", "head"))], out, config, runtime, proposals)


def _detect(checkpoints: list[tuple[Path, tuple[str, ...]]], out: Path, config: Detect, runtime: Runtime,
            proposals: Path | None = None) -> dict[str, Any]:
    import time

    import torch

    from altopt.evaluation.detections import Detections, to_coco_results
    from altopt.evaluation.ground_truth import counted
    from altopt.evaluation.recall import proposal_recall
    from cache.files import write_json_atomic
    from stages.inference import Inference
    from stages.training import CachedProposals

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
    return {"seconds_per_picture": round(seconds / max(len(found), 1), 5),
            "recall_at_0.5": float(recall.at(config.proposals)[0]), "average_recall": recall.average(config.proposals)}


def detected(rpn: "FasterRCNN", detector: "FasterRCNN", batch: "Batch", dataset: Dataset, config: Detect,
             cached: "CachedProposals | None" = None) -> "list[tuple[str, Detections, np.ndarray]]":
    """Return each picture's id, detections, and the proposals they come from, float32 [K, 4]; in the original frame.

    The proposals are the RPN's own, or cached ones. The RPN and the detector may be one network.
    """
    from altopt.detector import detect_on, own_proposals, propose_on
    from altopt.evaluation.detections import Detections
    from altopt.pictures import boxes_in_input, to_original

    features = rpn.conv(batch.images)
    if cached:
        rois = [boxes_in_input(cached.get(sample.id), sample).to(features.device) for sample in batch.samples]
    else:
        rois = [boxes for boxes, _ in propose_on(rpn, features, batch, own_proposals(config))]
    if detector is not rpn:
        features = detector.conv(batch.images)
    results = detect_on(detector, features, batch, rois, config)
    made = []
    for sample, own, result in zip(batch.samples, rois, results, strict=True):
        size = dataset.size(sample.id)
        boxes, scores, labels = (each.cpu().numpy() for each in (to_original(result[0], sample, size), *result[1:]))
        made.append((sample.id, Detections(boxes, scores, labels), to_original(own, sample, size).cpu().numpy()))
    return made
