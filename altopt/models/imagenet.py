"""ImageNet weights from torchvision: their names here, and fetching them with their hash checked."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from altopt.errors import ArtifactError, DownloadError
from altopt.models import backbones


def imagenet_url(name: str) -> str:
    """Return where torchvision's weights of a network lie. Raises ``ArtifactError`` for one that has none."""
    with torch.device("meta"):  # without memory: only the description is wanted
        weights = backbones.build(name).imagenet
    if weights is None:
        raise ArtifactError(f"torchvision has no ImageNet weights of {name}: pre-train it (a table pretrain_on_crops "
                            "in the recipe), or bring some with --from M0=FILE")
    return str(weights.url)


def download(name: str, url: str) -> dict[str, Tensor]:
    """Return torchvision's state dict for a network, from its cache or its host; the file's hash is checked.

    The file's name must end in the hash as torchvision's do. Raises ``DownloadError``.
    """
    try:
        _check_cached(url.rsplit("/", 1)[1])  # torch checks only what it has just fetched
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
    with torch.device("meta"):
        backbone = backbones.build(name)
    names = {f"fc.{ours}": f"classifier.{place}" for ours, place in backbone.classifier.items()}
    position = 0  # in torchvision's ``features``, of which our blocks are slices, in order
    for block, layers in backbone.conv.named_children():
        for number, _ in layers.named_children():
            names[f"conv.{block}.{number}"] = f"features.{position}"
            position += 1
    tensors = {}
    for part, module in (("conv", backbone.conv), ("fc", backbone.fc)):
        for key, wanted in module.state_dict().items():
            # The longest of our names that the key begins with: what is inside a layer has torchvision's own names.
            ours = next((each for each in names if f"{part}.{key}".startswith(f"{each}.")), None)
            if ours is None:
                continue  # SqueezeNet's classifier has no fc6 and fc7: they begin with new random weights
            theirs = names[ours] + f"{part}.{key}".removeprefix(ours)
            tensor = state.get(theirs)
            if tensor is None:
                raise ArtifactError(f"{source} has no tensor {theirs}: it is not a torchvision {name}")
            if tensor.shape != wanted.shape:
                raise ArtifactError(f"{source}: {theirs} is {tuple(tensor.shape)}, and {name} needs "
                                    f"{tuple(wanted.shape)}")
            tensors[f"{part}.{key}"] = tensor.float()
    return tensors
