"""What ResNet needs beside torchvision's layers: frozen batch normalisation, and res5 on RoIs in fc6's and fc7's place.

Source: He et al., "Deep residual learning", appendix A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from altopt.ops.targets import RoISample


class FrozenBatchNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """Batch normalisation whose four vectors are constants; without weights it passes everything through."""

    def reset_parameters(self) -> None:
        """Let it change nothing."""
        for buffer, value in ((self.weight, 1), (self.bias, 0), (self.running_mean, 0), (self.running_var, 1)):
            buffer.fill_(value)


class DropFirst(nn.Module):
    """Leaves out the first row and column of a map."""

    def forward(self, features: Tensor) -> Tensor:
        """Return ``Tensor[B, C, H - 1, W - 1]``."""
        return features[:, :, 1:, 1:]


class Res5(nn.Module):
    """The last three residual blocks and the mean over what they make of a pooled RoI."""

    def __init__(self, layer4: nn.Sequential) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, input: Tensor, rois: Sequence[RoISample] = ()) -> Tensor:
        """Return ``Tensor[R, 2048]`` for pooled RoIs ``Tensor[R, 1024 * 14 * 14]``; nothing is dropped of any RoI."""
        grid = input.reshape(-1, 1024, 14, 14).contiguous(memory_format=torch.channels_last)
        hidden: Tensor = self.layer4(grid)  # (R, 2048, 7, 7)
        return hidden.mean(dim=(2, 3))
