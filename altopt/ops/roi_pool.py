"""The one RoI-pooling op that every stage uses, on the CPU and on the GPU (Fast R-CNN, section 2.1).

torchvision's compiled kernel does what Caffe's layer does: corners are rounded to whole cells of the feature map,
both ends included, each bin takes its maximum, an empty bin is 0, and the backward pass follows the arg-max alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable


def roi_pool(features: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], output_size: int,
             spatial_scale: float) -> Tensor:
    """Max-pool each region of interest to a grid of ``output_size`` x ``output_size`` bins.

    ``features`` is ``Tensor[B, C, H, W]``, or one ``Tensor[C, h, w]`` for each image, in its own size; ``boxes`` holds,
    for each image, ``Tensor[R_b, 4]`` xyxy in pixels of the network's input, and ``spatial_scale`` is 1 / stride.
    Returns ``Tensor[sum of R_b, C, P, P]``, in the boxes' order. There is no gradient with respect to the boxes.
    """
    if not isinstance(features, Tensor):
        return torch.cat([roi_pool(own[None], [rois], output_size, spatial_scale)
                          for own, rois in zip(features, boxes, strict=True)])
    inclusive = torch.cat([_with_index(each.detach(), b) for b, each in enumerate(boxes)])  # (R, 5)
    inclusive[:, 3:] -= 1  # the kernel rounds inclusive pixels: the last pixel of a box is its edge less one
    inclusive = inclusive.to(features.dtype if features.dtype == torch.float64 else torch.float32)
    # The kernel knows float and double only, and under autocast features may be bfloat16.
    single = features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
    # A cell that is the arg-max of several bins gets the sum of their gradients. On CUDA the kernel's backward pass
    # adds them atomically, in no certain order, so with torch's switch for deterministic algorithms another one does.
    in_order = features.is_cuda and torch.are_deterministic_algorithms_enabled()
    pool = pool_in_order if in_order else torchvision.ops.roi_pool
    return pool(single, inclusive, output_size, spatial_scale).to(features.dtype)  # (R, C, P, P)


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
