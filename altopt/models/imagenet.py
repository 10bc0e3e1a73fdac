"""ImageNet weights from torchvision: their names here, and fetching them with their hash checked."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision import models

from altopt.errors import ArtifactError, DownloadError
from altopt.models import backbones

# The positions of fc6 and fc7 in torchvision's classifiers; SqueezeNet has none.
FULLY_CONNECTED = {"vgg16": {"fc6": 0, "fc7": 3}, "alexnet": {"fc6": 1, "fc7": 4}}

WEIGHTS: dict[str, models.WeightsEnum] = {
    "vgg16": models.VGG16_Weights.IMAGENET1K_V1,
    "alexnet": models.AlexNet_Weights.IMAGENET1K_V1,
    "squeezenet1_1": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


def download(name: str, url: str = "") -> dict[str, Tensor]:
    """Return torchvision's state dict for a network, from its cache or its host; the file's hash is checked.

    ``url`` stands in for torchvision's own; its file name must end in the hash as theirs do. Raises ``DownloadError``.
    """
    url = url or WEIGHTS[name].url
    try:
        _check_cached(url.rsplit("/", 1)[1])
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
    except (URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"the ImageNet weights of {name} could not be fetched from {url} ({reason}): bring the file and give it "
            "with --from M0=FILE, or put it into torch's cache (TORCH_HOME/hub/checkpoints)"
        ) from error
    return state


def _check_cached(name: str) -> None:
    """Raise ``OSError`` for a damaged file in torch's cache: torch checks only what it has just fetched."""
    path, promised = Path(torch.hub.get_dir(), "checkpoints", name), torch.hub.HASH_REGEX.search(name)
    if not path.exists() or promised is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(promised[1]):
        raise OSError(f"{path} has sha256 {digest[:8]}, not that of its name: delete it")


def from_torchvision(name: str, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return torchvision's tensors under altopt's names: ``conv.<block>.<n>.weight``, ``fc.fc6.weight``, ...

    ``source`` names the file in messages. Raises ``ArtifactError`` for a tensor that is missing or of another shape.
    """
    names = _conv_names(name)
    names |= {f"classifier.{position}": f"fc.{layer}" for layer, position in FULLY_CONNECTED.get(name, {}).items()}
    shapes = _shapes(name)
    tensors = {}
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            tensor = state.get(f"{theirs}.{kind}")
            if tensor is None:
                raise ArtifactError(f"{source} has no tensor {theirs}.{kind}: it is not a torchvision {name}")
            if tensor.shape != shapes[f"{ours}.{kind}"]:
                raise ArtifactError(f"{source}: {theirs}.{kind} is {tuple(tensor.shape)}, and {name} needs "
                                    f"{tuple(shapes[f'{ours}.{kind}'])}")
            tensors[f"{ours}.{kind}"] = tensor.float()
    return tensors


def _conv_names(name: str) -> dict[str, str]:
    """Return {torchvision's module: ours}: our blocks are slices of its ``features``, in order."""
    with torch.device("meta"):
        conv = backbones.build(name).conv
    names: dict[str, str] = {}
    position = 0
    for block, layers in conv.named_children():
        for number, layer in layers.named_children():
            for inner, module in layer.named_modules():
                if isinstance(module, nn.Conv2d):
                    suffix = f".{inner}" if inner else ""
                    names[f"features.{position}{suffix}"] = f"conv.{block}.{number}{suffix}"
            position += 1
    return names


def _shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        backbone = backbones.build(name)
    parts = {"conv": backbone.conv, "fc": backbone.fc}
    return {f"{part}.{key}": tensor.shape
            for part, module in parts.items() for key, tensor in module.state_dict().items()}
