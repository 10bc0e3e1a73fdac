"""RoI sampling: what exact joint training puts in the place of RoI pooling, differentiable in the boxes too.

RoI pooling rounds a box to whole cells, so its output has no derivative with respect to the box. Here each bin takes
its maximum over a fixed grid of points inside it, and a point takes the feature map's value by bilinear interpolation,
which varies with the point. As in RoI pooling the gradient of a bin follows its arg-max alone: to the four cells around
that point, and to the box edges that the point moves with.
Source: Faster R-CNN, section 3.2, which asks for such an op; Girshick, "Training R-CNNs of various velocities".

Letters: B images, R RoIs, P bins and S sample points to a side, C channels, H and W of the feature map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from altopt.ops.roi_pool import roi_pool


def roi_sample(features: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], output_size: int, spatial_scale: float,
               samples_per_bin: int) -> Tensor:
    """Sample each region of interest to a grid of P x P bins, each the maximum of S x S points evenly spread in it.

    ``features`` is ``Tensor[B, C, H, W]``, or one ``Tensor[C, h, w]`` for each image; ``boxes`` holds, for each image
    of the batch, ``Tensor[R_b, 4]`` xyxy in pixels of the network's input; ``spatial_scale`` is 1 / stride,
    ``output_size`` P, ``samples_per_bin`` S. Returns ``Tensor[sum of R_b, C, P, P]``, in the boxes' order, with
    gradients for the features and for the boxes.

    Cell (i, j) of the features stands for the point (16 j + 8, 16 i + 8) of the image. Beyond the centres of the
    outermost cells the value is theirs; a bin with no point on the map is 0, as an empty bin of RoI pooling is.
    """
    if not isinstance(features, Tensor):
        return torch.cat([roi_sample(own[None], [rois], output_size, spatial_scale, samples_per_bin)
                          for own, rois in zip(features, boxes, strict=True)])
    precise = features.to(torch.promote_types(features.dtype, torch.float32))  # bfloat16 is too coarse for coordinates
    rois = torch.cat(list(boxes)).to(precise.dtype) * spatial_scale  # (R, 4) in units of cells
    image = torch.repeat_interleave(torch.tensor([len(each) for each in boxes])).to(rois.device)  # (R,)
    height, width = features.shape[2:]
    x = _points(rois[:, 0], rois[:, 2], output_size * samples_per_bin)  # (R, P*S)
    y = _points(rois[:, 1], rois[:, 3], output_size * samples_per_bin)  # (R, P*S)
    pooled = F.max_pool2d(_interpolated(precise, image, x, y), samples_per_bin)  # (R, C, P, P)
    on_map = _touched(y, height, output_size)[:, :, None] & _touched(x, width, output_size)[:, None, :]  # (R, P, P)
    return (pooled * on_map[:, None]).to(features.dtype)


def pool_rois(features: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], output_size: int, spatial_scale: float,
              samples_per_bin: int) -> Tensor:
    """Return what ``roi_sample`` does or, for 0 samples per bin, what ``roi_pool`` does."""
    if samples_per_bin:
        return roi_sample(features, boxes, output_size, spatial_scale, samples_per_bin)
    return roi_pool(features, boxes, output_size, spatial_scale)


def _points(start: Tensor, end: Tensor, count: int) -> Tensor:
    """Return the middles of ``count`` equal parts from start to end, each ``Tensor[R]``: -> ``Tensor[R, count]``."""
    middles = (torch.arange(count, device=start.device, dtype=start.dtype) + 0.5) / count
    return start[:, None] + (end - start)[:, None] * middles


def _interpolated(features: Tensor, image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the features at every (x, y), ``Tensor[R, Q]`` each, of each RoI's image: ``Tensor[R, C, Q, Q]``.

    A point is a weighted sum of four cells, which is what an embedding bag computes: on the CPU that takes half of
    grid_sample's time or less, and on the GPU its backward pass, unlike grid_sample's, adds up in a fixed order, as
    ``altopt.machine.determinism`` asks for.
    """
    channels, height, width = features.shape[1:]
    rows, row_shares = _neighbours(y, height)  # (R, Q, 2)
    columns, column_shares = _neighbours(x, width)  # (R, Q, 2)
    rows = rows + (image * height)[:, None, None]
    cells = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]  # (R, Q, Q, 2, 2)
    shares = row_shares[:, :, None, :, None] * column_shares[:, None, :, None, :]  # (R, Q, Q, 2, 2)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)  # (B*H*W, C)
    values = F.embedding_bag(cells.reshape(-1, 4), table, per_sample_weights=shares.reshape(-1, 4), mode="sum")
    return values.view(*cells.shape[:3], channels).permute(0, 3, 1, 2)


def _neighbours(points: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return the two cells whose centres a point lies between, int64 ``Tensor[R, Q, 2]``, and the share of each."""
    place = (points - 0.5).clamp(0, cells - 1)  # from the first centre, at half a cell
    first = place.detach().floor().clamp(0, max(cells - 2, 0))
    share = place - first
    second = (first + 1).clamp(max=cells - 1)
    return torch.stack([first, second], dim=2).long(), torch.stack([1 - share, share], dim=2)


def _touched(points: Tensor, cells: int, bins: int) -> Tensor:
    """Return which bins have a point on a map of so many cells: ``Tensor[R, P*S]`` -> ``BoolTensor[R, P]``."""
    on_map = (points >= 0) & (points <= cells)
    return on_map.view(len(points), bins, points.shape[1] // bins).any(dim=2)
