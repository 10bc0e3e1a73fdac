"""RoI pooling on the CPU where nothing is learned from it: each bin's maximum from four cells of a table.

A maximum over any window of a map is the maximum of four windows that cover it, whose sides are powers of two. These
are tabulated once for an image, by vector instructions on all of torch's threads, each size from the one half as
large; then a bin costs four rows of the tables, however many cells it has. The kernel of torchvision, which looks at
every cell of every bin, takes about three times as long, but says where the maxima were, as the backward pass needs.

Letters: B images, C channels, R RoIs, P bins on a side.
"""

import torch
from torch import Tensor

ROIS_AT_ONCE = 32  # whose rows fit the cache


def pool_by_tables(features: Tensor, rois: Tensor, output_size: int, spatial_scale: float) -> Tensor:
    """Return what torchvision's op does for ``rois`` ``Tensor[R, 5]``, without autograd: ``Tensor[R, C, P, P]``.

    ``features`` is ``Tensor[B, C, H, W]`` of any floating type, whose values are passed on as they are; NaN too, which
    the kernel skips.
    """
    channels, height, width = features.shape[1:]
    pooled = features.new_zeros(len(rois), channels, output_size, output_size)
    corners = _rounded(rois[:, 1:] * spatial_scale)
    rows = _spans(corners[:, 1], corners[:, 3], output_size, height)  # (2, R, P)
    columns = _spans(corners[:, 0], corners[:, 2], output_size, width)
    for image, maps in enumerate(features):
        own = torch.nonzero(rois[:, 0] == image)[:, 0]
        if len(own):
            tables = _Tables(maps, rows[:, own], columns[:, own])
            for some in torch.split(torch.arange(len(own)), ROIS_AT_ONCE):
                pooled[own[some]] = tables.maxima(some)
    return pooled


class _Tables:
    """The maxima of all windows of an image's maps whose sides are powers of two, up to those that the bins need."""

    def __init__(self, maps: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Tabulate ``maps``, ``Tensor[C, H, W]``, for bins that begin and end at ``rows`` and ``columns``.

        These are ``Tensor[2, R, P]`` each.
        """
        self.empty = (rows[1] <= rows[0])[:, :, None] | (columns[1] <= columns[0])[:, None, :]  # (R, P, P)
        channels, height, width = maps.shape
        tall, tops = _covered(rows, height)  # log2 of the windows' sides (R, P), and where two begin (2, R, P)
        wide, lefts = _covered(columns, width)
        tables = self._tabulated(maps.permute(1, 2, 0), int(tall.max()), int(wide.max()))
        size = (tall[:, :, None] * tables.shape[1] + wide[:, None, :]) * height  # (R, P, P)
        self.places = torch.stack([
            (size + top[:, :, None]) * width + left[:, None, :] for top in tops for left in lefts])  # (4, R, P, P)
        self.cells = tables.view(-1, channels)

    @staticmethod
    def _tabulated(cells: Tensor, tall: int, wide: int) -> Tensor:
        """Return maxima ``Tensor[tall + 1, wide + 1, H, W, C]`` of the windows that begin at a cell of ``[H, W, C]``.

        Where a window would reach out of the map, its entry means nothing.
        """
        tables = cells.new_empty(tall + 1, wide + 1, *cells.shape)
        tables[0, 0] = cells
        for i in range(tall + 1):
            if i:
                half = 2 ** (i - 1)
                smaller = tables[i - 1, 0]
                torch.maximum(smaller[:-half], smaller[half:], out=tables[i, 0, :-half])
            for j in range(1, wide + 1):
                half = 2 ** (j - 1)
                smaller = tables[i, j - 1]
                torch.maximum(smaller[:, :-half], smaller[:, half:], out=tables[i, j, :, :-half])
        return tables

    def maxima(self, some: Tensor) -> Tensor:
        """Return the maxima of all bins of some RoIs, int64 ``Tensor[r]``: ``Tensor[r, C, P, P]``."""
        places = self.places[:, some].flatten(1)  # (4, r * P * P)
        largest = self.cells[places[0]]
        for others in places[1:]:
            torch.maximum(largest, self.cells[others], out=largest)
        empty = self.empty[some]
        return largest.view(*empty.shape, -1).masked_fill_(empty[..., None], 0).permute(0, 3, 1, 2)


def _rounded(values: Tensor) -> Tensor:
    """Return the values rounded to whole numbers, half of one away from zero, as C does."""
    whole = values.trunc()
    return whole + torch.where((values - whole).abs() >= 0.5, values.sign(), 0)


def _spans(first: Tensor, last: Tensor, bins: int, limit: int) -> Tensor:
    """Return where bins begin and end on a side of ``limit`` cells, int64 ``Tensor[2, R, P]``, as the kernel has it.

    ``first`` and ``last`` are the RoIs' first and last cells, ``Tensor[R]`` each.
    """
    side = (last - first + 1).clamp(min=1)[:, None] / bins
    number = torch.arange(bins, dtype=side.dtype)
    ends = torch.stack([(number * side).floor(), ((number + 1) * side).ceil()])
    return (ends + first[:, None]).clamp(0, limit).long()


def _covered(spans: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return log2 of the largest window that fits each span, ``Tensor[R, P]``, and where two begin that cover it.

    That is ``Tensor[2, R, P]``. An empty span has a window somewhere.
    """
    begin, end = spans
    size = torch.frexp((end - begin).clamp(min=1).float()).exponent.long() - 1
    return size, torch.stack([begin.clamp(max=limit - 1), (end - 2**size).clamp(min=0)])
