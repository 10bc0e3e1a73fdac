"""What one image's losses are taken on: anchors, or RoIs, and what should become of them.

They depend on the image's objects (and proposals) and on a seed, never on what the network computes, but for joint
training's RoIs. So they are drawn where images are read, and a step need not wait to learn how many there are.
Letters: M anchors, R RoIs, F of either that are positive.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AnchorSample:
    """The anchors of one image that an RPN step trains on.

    ``used``: int64 ``Tensor[M]``, which anchors; ``labels``: int64 ``Tensor[M]``, 1 an object, 0 background;
    ``positive``: int64 ``Tensor[F]``, those with label 1; ``deltas``: ``Tensor[F, 4]``, to their objects.
    """

    used: Tensor
    labels: Tensor
    positive: Tensor
    deltas: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "AnchorSample":
        """Return the sample with every tensor changed, such as moved to a device."""
        return AnchorSample(change(self.used), change(self.labels), change(self.positive), change(self.deltas))


@dataclass(frozen=True, eq=False)
class RoISample:
    """The RoIs of one image that a Fast R-CNN step trains on, the ``foreground`` first ones being objects.

    ``rois``: ``Tensor[R, 4]``; ``labels``: int64 ``Tensor[R]``, 0 background, class + 1 otherwise;
    ``deltas``: ``Tensor[R, 4]``, not normalised, meaningful in the first ``foreground`` rows. ``dropout_seed`` decides
    what dropout drops of them, whatever other images share the batch.
    """

    rois: Tensor
    labels: Tensor
    deltas: Tensor
    foreground: int
    dropout_seed: int = 0

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "RoISample":
        """Return the sample with every tensor changed, such as moved to a device."""
        return replace(self, rois=change(self.rois), labels=change(self.labels), deltas=change(self.deltas))
