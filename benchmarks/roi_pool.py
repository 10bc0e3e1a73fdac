"""What adding up in a fixed order costs in RoI pooling: ``python -m benchmarks.roi_pool [--device cuda]``.

Times forward and backward of ``altopt.roi_pool`` on VGG16's conv5 map of a picture of 608 x 800, with torchvision's
backward pass and with that of ``--deterministic``, in turns, and prints the medians and their ratio. On the CPU it is
processor time of one thread, unless --threads says otherwise; on CUDA the time between two events.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from altopt.determinism import fixed_order
from altopt.roi_pool import roi_pool

SHAPE = (1, 512, 38, 50)  # conv5 of VGG16
GRID = 7
STRIDE = 16


def regions(count: int, random: torch.Generator) -> Tensor:
    """Return boxes ``Tensor[count, 4]`` in pixels of the picture, with sides of 32 to 400."""
    limit = torch.tensor([SHAPE[3] * STRIDE, SHAPE[2] * STRIDE])
    sides = 32 + torch.rand(count, 2, generator=random) * 368
    corners = torch.rand(count, 2, generator=random) * (limit - sides)
    return torch.cat([corners, corners + sides], dim=1)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return what one call takes: processor time, or on CUDA the device's."""
    if device.type != "cuda":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1000


def measure(device: torch.device, rois: int, repeats: int) -> dict[bool, float]:
    """Return the median seconds with torchvision's backward pass (False) and in a fixed order (True)."""
    random = torch.Generator().manual_seed(0)
    features = torch.rand(*SHAPE, generator=random).to(device).requires_grad_()
    boxes = [regions(rois, random).to(device)]
    gradient = torch.randn(rois, SHAPE[1], GRID, GRID, generator=random).to(device)

    def step() -> None:
        features.grad = None
        roi_pool(features, boxes, GRID, 1 / STRIDE).backward(gradient)

    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):
        for wanted, times in taken.items():
            with fixed_order(wanted):
                times.append(seconds(step, device))
    return {wanted: statistics.median(times[1:]) for wanted, times in taken.items()}  # the first ones warm up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rois", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    taken = measure(chosen.device, chosen.rois, chosen.repeats)
    print(f"{chosen.rois} RoIs on {' x '.join(map(str, SHAPE[1:]))}, {chosen.device}, forward and backward: "
          f"torchvision's {taken[False] * 1000:.1f} ms, in a fixed order {taken[True] * 1000:.1f} ms, "
          f"ratio {taken[True] / taken[False]:.2f}")


if __name__ == "__main__":
    main()
