"""The one RoI-pooling op that every stage uses, on the CPU and on the GPU (Fast R-CNN, section 2.1).

torchvision's compiled kernel does what Caffe's layer does: corners are rounded to whole cells of the feature map,
both ends included, each bin takes its maximum, an empty bin is 0, and the backward pass follows the arg-max alone.

On the CPU the kernel works on one thread. Channels have nothing to do with each other in it, so where there is much to
pool several threads get some of them each, and the result is the same bits. Where no gradient is asked for, they come
from tables (altopt/ops/window_maxima.py).

A cell that is the arg-max of several bins gets the sum of their gradients. The kernel's backward pass adds them on CUDA
atomically, in no certain order; with torch's switch for deterministic algorithms, it is done there in a fixed one.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable

from altopt.machine.threads import single_threads
from altopt.ops.window_maxima import pool_by_tables

LEAST_MAPS = 16_384  # RoIs times channels for a thread: with fewer, to divide costs more than it saves


def roi_pool(features: Tensor, boxes: Sequence[Tensor], output_size: int, spatial_scale: float) -> Tensor:
    """Max-pool each region of interest to a grid of ``output_size`` x ``output_size`` bins.

    ``features`` is ``Tensor[B, C, H, W]``; ``boxes`` holds, for each image of the batch, ``Tensor[R_b, 4]`` xyxy in
    pixels of the network's input, and ``spatial_scale`` is 1 / stride. Returns ``Tensor[sum of R_b, C, P, P]``, in
    the boxes' order. There is no gradient with respect to the boxes.

    The kernel rounds inclusive pixels, so the last pixel of a box is its edge less one.
    """
    inclusive = torch.cat([_with_index(each.detach(), b) for b, each in enumerate(boxes)])  # (R, 5)
    inclusive[:, 3:] -= 1
    inclusive = inclusive.to(features.dtype if features.dtype == torch.float64 else torch.float32)
    pool = _kernel_for(features.device, torch.is_grad_enabled() and features.requires_grad)
    if pool is pool_by_tables:
        return pool(features, inclusive, output_size, spatial_scale)
    # The kernel knows float and double only, and under autocast features may be bfloat16.
    single = features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
    return pool(single, inclusive, output_size, spatial_scale).to(features.dtype)  # (R, C, P, P)


def _kernel_for(device: torch.device, learned: bool) -> Callable[[Tensor, Tensor, int, float], Tensor]:
    if device.type == "cpu":
        return pool_in_threads if learned else pool_by_tables  # which always add in the same order
    kernel: Callable[[Tensor, Tensor, int, float], Tensor] = torchvision.ops.roi_pool
    return pool_in_order if torch.are_deterministic_algorithms_enabled() else kernel


def pool_in_threads(features: Tensor, rois: Tensor, output_size: int, spatial_scale: float) -> Tensor:
    """Return what torchvision's op does for ``rois`` ``Tensor[R, 5]``, by as many threads as pay, and as torch has."""
    count = min(torch.get_num_threads(), len(rois) * features.shape[1] // LEAST_MAPS)
    pooled: Tensor
    if count > 1:
        pooled = _PoolInThreads.apply(features, rois, output_size, spatial_scale, count)
    else:
        pooled = torchvision.ops.roi_pool(features, rois, output_size, spatial_scale)
    return pooled


class _PoolInThreads(torch.autograd.Function):
    """The kernel on some of the channels in each thread; it lets go of the interpreter while it works."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, output_size: int, spatial_scale: float, count: int) -> Tensor:
        def pool(channels: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = torch.ops.torchvision.roi_pool(
                channels, rois, spatial_scale, output_size, output_size)
            return found

        pooled, places = zip(*_threads(count).map(pool, features.detach().chunk(count, dim=1)), strict=True)
        ctx.save_for_backward(rois, *places)
        ctx.shape, ctx.grid = features.shape, (spatial_scale, output_size, output_size)
        return torch.cat(pooled, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        rois, *places = ctx.saved_tensors
        images, _, height, width = ctx.shape

        def spread(gradient: Tensor, places: Tensor) -> Tensor:
            spread: Tensor = torch.ops.torchvision._roi_pool_backward(
                gradient, rois, places, *ctx.grid, images, places.shape[1], height, width)
            return spread

        gradients = torch.split(gradient, [each.shape[1] for each in places], dim=1)
        parts = list(_threads(len(places)).map(spread, gradients, places))
        return torch.cat(parts, dim=1), None, None, None, None


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Return the threads that pool, where channels go to so many."""
    return single_threads(count, "altopt-roi-pool")


def pool_in_order(features: Tensor, rois: Tensor, output_size: int, spatial_scale: float) -> Tensor:
    """Return what torchvision's op does for ``rois`` ``Tensor[R, 5]``; the backward pass adds up in their order."""
    pooled: Tensor = _PoolInOrder.apply(features, rois, output_size, spatial_scale)
    return pooled


class _PoolInOrder(torch.autograd.Function):
    """The kernel forward, which says where each maximum was; backward one sum over those places.

    ``index_add`` goes through its indices one by one on the CPU; on CUDA, with torch's switch, it sorts them first.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, output_size: int, spatial_scale: float) -> Tensor:
        pooled: Tensor
        pooled, places = torch.ops.torchvision.roi_pool(features, rois, spatial_scale, output_size, output_size)
        ctx.save_for_backward(rois, places)  # places: int32 (R, C, P, P), row * W + column, -1 in an empty bin
        ctx.shape = features.shape
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rois, places = ctx.saved_tensors
        _, channels, height, width = ctx.shape
        maps = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)  # (R, C)
        cells = maps[:, :, None, None] * (height * width) + places.clamp(min=0)  # (R, C, P, P)
        values = gradient.where(places >= 0, 0.0)
        total = gradient.new_zeros(ctx.shape.numel()).index_add_(0, cells.flatten(), values.flatten())
        return total.view(ctx.shape), None, None, None


def _with_index(boxes: Tensor, image: int) -> Tensor:
    return torch.cat([boxes.new_full((len(boxes), 1), image), boxes], dim=1)  # (R_b, 5)
