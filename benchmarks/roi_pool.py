"""What RoI pooling costs: ``python -m benchmarks.roi_pool [--device cuda]``.

Times forward and backward passes on VGG16's conv5 map of an image of 608 x 800: of torchvision's op as it is, of
``altopt.ops.roi_pool``, also in the fixed order of ``--deterministic``, and where no gradient is asked for (which goes
by tables of window maxima on the CPU); in turns, and prints the medians. On the CPU with one thread (the default) it
is processor time, with several the clock's; on CUDA that between two events.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torchvision
from torch import Tensor

from altopt.machine.allocation import keep_freed_memory
from altopt.machine.determinism import fixed_order
from altopt.ops.roi_pool import roi_pool

SHAPE = (1, 512, 38, 50)  # conv5 of VGG16
GRID = 7
STRIDE = 16
Result = TypeVar("Result")
TORCHVISION, ALTOPT, IN_ORDER, CONSTANT = WAYS = (
    "torchvision", "altopt", "altopt, in a fixed order", "altopt, without a gradient")


def regions(count: int, random: torch.Generator) -> Tensor:
    """Return boxes ``Tensor[count, 4]`` in pixels of the image, with sides of 32 to 400."""
    limit = torch.tensor([SHAPE[3] * STRIDE, SHAPE[2] * STRIDE])
    sides = 32 + torch.rand(count, 2, generator=random) * 368
    corners = torch.rand(count, 2, generator=random) * (limit - sides)
    return torch.cat([corners, corners + sides], dim=1)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the seconds that a call takes, and what it returns."""
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begin = clock()
        result = work()
        return clock() - begin, result
    begin_event, end_event = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin_event.record()
    result = work()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1000, result


def pooled(way: str, features: Tensor, boxes: Tensor) -> Tensor:
    """Return the pooled regions ``Tensor[R, C, P, P]``, pooled in one of the ways."""
    if way != TORCHVISION:
        return roi_pool(features, [boxes], GRID, 1 / STRIDE)
    inclusive = torch.cat([boxes.new_zeros(len(boxes), 1), boxes - boxes.new_tensor([0, 0, 1, 1])], dim=1)
    result: Tensor = torchvision.ops.roi_pool(features, inclusive, GRID, 1 / STRIDE)
    return result


def measure(device: torch.device, rois: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Return for each of ``WAYS`` the median seconds of a forward pass, and of a backward pass."""
    random = torch.Generator().manual_seed(0)
    features = torch.rand(*SHAPE, generator=random).to(device, memory_format=torch.channels_last).requires_grad_()
    boxes = regions(rois, random).to(device)
    gradient = torch.randn(rois, SHAPE[1], GRID, GRID, generator=random).to(device)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(repeats + 1):
        for way, times in taken.items():
            with fixed_order(way == IN_ORDER):
                features.grad = None
                given = features.detach() if way == CONSTANT else features
                forward, result = timed(partial(pooled, way, given, boxes), device)
                backward = 0.0 if way == CONSTANT else timed(partial(result.backward, gradient), device)[0]
                times.append((forward, backward))
    medians = {}
    for way, times in taken.items():
        forward, backward = (statistics.median(column) for column in zip(*times[1:], strict=True))
        medians[way] = forward, backward  # the first ones warm up
    return medians


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rois", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_freed_memory()  # as altopt's commands do
    print(f"{chosen.rois} RoIs on {' x '.join(map(str, SHAPE[1:]))}, {chosen.device}, {chosen.threads} threads")
    taken = measure(chosen.device, chosen.rois, chosen.repeats)
    theirs, their_forward = sum(taken[TORCHVISION]), taken[TORCHVISION][0]
    for way, (forward, backward) in taken.items():
        if way == CONSTANT:
            print(f"{way}: forward {forward * 1000:.1f} ms, {forward / their_forward:.2f} times torchvision's")
        else:
            print(f"{way}: forward {forward * 1000:.1f} ms, backward {backward * 1000:.1f} ms, together "
                  f"{(forward + backward) / theirs:.2f} times torchvision's")


if __name__ == "__main__":
    main()
