"""From SVM scores and regressed boxes to the detections of an image (R-CNN, section 2.2).

Letters: R regions, K classes, D detections.
"""

import torch
import torchvision
from torch import Tensor

from altopt.config import RegionDetectionSettings
from altopt.ops import boxes as bx


def region_detections(scores: Tensor, deltas: Tensor, regions: Tensor, size: tuple[int, int],
                      rule: RegionDetectionSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Return an image's detections, best first: boxes ``Tensor[D, 4]``, scores ``Tensor[D]``, classes ``Tensor[D]``.

    ``scores`` is ``Tensor[R, K]``, ``deltas`` ``Tensor[R, K, 4]``; ``regions`` ``Tensor[R, 4]`` and the result are in
    the original frame, whose ``size`` is (width, height). Of each class the ``rule.per_class`` best above the floor go
    into suppression, which is class by class.
    """
    boxes = bx.clip(bx.decode(deltas, regions), size)  # (R, K, 4)
    count = min(rule.per_class, len(scores))
    best, chosen = scores.topk(count, dim=0)  # (count, K)
    rank, label = torch.nonzero(best > rule.score, as_tuple=True)
    scores, boxes = best[rank, label], boxes[chosen[rank, label], label]
    kept = torchvision.ops.batched_nms(boxes, scores, label, rule.nms)
    return boxes[kept], scores[kept], label[kept]
