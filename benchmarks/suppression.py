"""What suppression costs: ``python -m benchmarks.suppression [--device cuda] [--threads 2]``.

Boxes are the anchors of VGG16's map of an image of 600 x 800, moved by an RPN that has just been drawn or by one that
is sure of a few places; they are sorted, and the best 2000 apart (IoU 0.7) are kept, as for training, or the best 300
of 6000, as for detection. Times ``altopt.ops.nms`` and torchvision's op in turns and prints the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor

from altopt.config import NetworkConfig
from altopt.ops import boxes as bx
from altopt.ops.anchors import reference_anchors, shifted_anchors
from altopt.ops.nms import nms_keeping_best

WIDTH, HEIGHT, STRIDE = 800, 600, 16
OVERLAP = 0.7


def boxes_of(sure: bool, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return boxes ``Tensor[N, 4]`` in pixels, best first, and their scores ``Tensor[N]``."""
    network = NetworkConfig(name="vgg16")
    reference = reference_anchors(network.anchor_base, network.anchor_ratios, network.anchor_scales)
    anchors = shifted_anchors(reference, HEIGHT // STRIDE, WIDTH // STRIDE, STRIDE)
    boxes = bx.clip(bx.decode(torch.randn(len(anchors), 4, generator=random) * 0.1, anchors), (WIDTH, HEIGHT))
    scores = torch.rand(len(anchors), generator=random)
    if sure:
        objects = torch.rand(6, 2, generator=random) * torch.tensor([WIDTH, HEIGHT])
        scores -= torch.cdist(bx.to_cxcywh(anchors)[0], objects).amin(dim=1) / 20
    order = scores.argsort(descending=True)
    return boxes[order], scores[order]


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Return the seconds that a call takes, the device's work included, and what it returns."""
    begin = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(f"{chosen.device}, {chosen.threads} threads; milliseconds of torchvision's op and of altopt")
    for name, sure in (("just drawn", False), ("sure of six places", True)):
        boxes, scores = (each.to(chosen.device) for each in boxes_of(sure, torch.Generator().manual_seed(0)))
        for among, count in ((len(boxes), 2000), (12_000, 2000), (6000, 300)):
            some = boxes[:among], scores[:among]
            taken: list[tuple[float, float]] = []
            for _ in range(chosen.repeats + 1):
                theirs, kept = timed(partial(torchvision.ops.nms, *some, OVERLAP), chosen.device)
                ours, best = timed(partial(nms_keeping_best, *some, OVERLAP, count), chosen.device)
                assert torch.equal(kept[:count], best)
                taken.append((theirs, ours))
            theirs, ours = (1000 * statistics.median(column) for column in zip(*taken[1:], strict=True))
            print(f"RPN {name}, best {len(best)} of {among}: {theirs:.1f}, {ours:.1f}; {ours / theirs:.2f} of the time")


if __name__ == "__main__":
    main()
