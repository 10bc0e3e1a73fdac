"""What all networks share: they are made of named parts, which go to checkpoints one by one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from altopt.config import TORCHVISION_PIXELS
from altopt.errors import ArtifactError
from altopt.models.dropout import FullyConnected
from altopt.models.resnet import Res5

# Standard deviations of new random weights: Faster R-CNN, section 3.1.3, and Fast R-CNN, section 2.3. Other layers
# follow He et al.
INITIAL_STD = {"rpn.conv": 0.01, "rpn.cls_score": 0.01, "rpn.bbox_pred": 0.01, "head.cls_score": 0.01,
               "head.bbox_pred": 0.001}


class NetworkOfParts(nn.Module):
    """A network of parts such as ``conv``, ``fc`` (fc6, fc7) and ``head``, the names that checkpoints use.

    It is on the meta device, without memory, until ``fill`` gives it weights.
    """

    conv: nn.Sequential
    fc: FullyConnected | Res5
    pixels = TORCHVISION_PIXELS  # what its weights want of an image

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], random: torch.Generator, fresh: Sequence[str] = ()) -> list[str]:
        """Take each layer's weights and buffers from the tensors; return the layers that are re-initialised.

        Those are the layers of parts in ``fresh``, layers that are missing, and layers of another shape, as fc6 is
        where a pyramid takes the place of the RoI grid that it was trained on. ``conv`` is never re-initialised: for a
        layer of it that is missing or does not fit, raises ``ArtifactError``.
        """
        new = []
        for name, layer in self.named_modules():
            part = name.split(".")[0]
            own = {key: value for key, value in layer.state_dict(keep_vars=True).items() if "." not in key}
            if not own:
                continue
            held = {key: tensors[f"{name}.{key}"] for key in own if f"{name}.{key}" in tensors}
            fits = all(key in held and held[key].shape == own[key].shape for key in own)
            if part == "conv" and not fits:
                raise ArtifactError(f"the initial weights have no {name} that fits: give those of this network")
            if fits and part not in fresh:
                layer.load_state_dict(held, strict=False, assign=True)  # not strict: its children come by themselves
                layer.requires_grad_(True)  # what is assigned has lost it
            else:
                layer.to_empty(device="cpu", recurse=False)
                initialise(name, layer, random)
                new.append(name)
        left = [name for name, tensor in [*self.named_parameters(), *self.named_buffers()] if tensor.is_meta]
        if left:
            raise TypeError(f"{left[0]} is in no checkpoint and has no value: register it as a persistent buffer")
        return new

    def set_dropout(self, probability: float) -> None:
        """Set the share of features that training drops after fc6 and fc7."""
        for layer in self.fc.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = probability

    def round_fc(self) -> None:
        """Let fc6 and fc7 hold their weights in bfloat16, in which autocast would make them anew for every batch.

        For networks that only compute, under autocast: the results are the same.
        """
        for layer in self.fc.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.to(torch.bfloat16)

    def tensors(self, parts: Sequence[str]) -> dict[str, Tensor]:
        """Return the named parts' weights, as a checkpoint holds them."""
        return {
            f"{part}.{name}": tensor.detach().to("cpu", memory_format=torch.contiguous_format)
            for part in parts for name, tensor in getattr(self, part).state_dict().items()
        }


def initialise_all(part: nn.Module, random: torch.Generator, name: str = "") -> None:
    """Give all layers of a part, or of a network, new random weights; ``name`` is that of the part in its network."""
    for path, layer in part.named_modules(prefix=name):
        initialise(path, layer, random)


@torch.no_grad()
def initialise(name: str, layer: nn.Module, random: torch.Generator) -> None:
    """Give a layer, without its children, new random weights and zero biases, or what it resets itself to."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        if name in INITIAL_STD:
            nn.init.normal_(layer.weight, std=INITIAL_STD[name], generator=random)
        else:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=random)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif callable(reset := getattr(layer, "reset_parameters", None)):
        reset()
    elif any("." not in key for key in layer.state_dict()):
        raise TypeError(f"{name}, a {type(layer).__name__}, does not say how it begins: give it reset_parameters()")
