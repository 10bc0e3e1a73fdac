"""The one RoI-pooling op that every stage uses, on the CPU and on the GPU (Fast R-CNN, section 2.1).

torchvision's compiled kernel does what Caffe's layer does: corners are rounded to whole cells of the feature map,
both ends included, each bin takes its maximum, an empty bin is 0, and the backward pass follows the arg-max alone.
"""

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor


def roi_pool(features: Tensor, boxes: Sequence[Tensor], output_size: int, spatial_scale: float) -> Tensor:
    """Max-pool each region of interest to a grid of ``output_size`` x ``output_size`` bins.

    ``features`` is ``Tensor[B, C, H, W]``; ``boxes`` holds, for each picture of the batch, ``Tensor[R_b, 4]`` xyxy in
    pixels of the network's input, and ``spatial_scale`` is 1 / stride. Returns ``Tensor[sum of R_b, C, P, P]``, in
    the boxes' order. There is no gradient with respect to the boxes.

    The kernel rounds inclusive pixels, so the last pixel of a box is its edge less one.
    """
    rois = torch.cat([_with_index(each, b) for b, each in enumerate(boxes)])  # (R, 5)
    inclusive = rois - rois.new_tensor([0, 0, 0, 1, 1])
    # The kernel knows float and double only, and under autocast features may be bfloat16.
    pooled: Tensor = torchvision.ops.roi_pool(
        features.float() if features.dtype in (torch.bfloat16, torch.float16) else features,
        inclusive.to(features.dtype if features.dtype == torch.float64 else torch.float32),
        output_size,
        spatial_scale,
    )
    return pooled.to(features.dtype)  # (R, C, P, P)


def _with_index(boxes: Tensor, picture: int) -> Tensor:
    return torch.cat([boxes.new_full((len(boxes), 1), picture), boxes], dim=1)  # (R_b, 5)
