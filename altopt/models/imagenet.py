"""ImageNet weights from torchvision: their names here, and fetching them with their hash checked."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from altopt.datasets.download import Progress, fetch, matches
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


def download(name: str, url: str, progress: Progress | None = None) -> dict[str, Tensor]:
    """Return torchvision's state dict for a network, from torch's cache or from its host, into that cache.

    The file's name must end in the first digits of its SHA-256, as torchvision's do, and they are checked every time. A
    transfer that was broken off goes on where it was. Raises ``DownloadError``.
    """
    file = url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    _check_cached(name, path)
    remedy = (f"bring the file and give it with --from M0=FILE, or put it into torch's cache ({path.parent}, by "
              "TORCH_HOME)")
    try:
        fetch([url], path, size=None, checksum=_checksum(file), progress=progress, remedy=remedy)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except DownloadError as error:
        raise DownloadError(f"the ImageNet weights of {name}: {error}") from error
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise DownloadError(f"the ImageNet weights of {name}: {path} does not hold tensors alone: {remedy}") from error
    return state


def _checksum(file: str) -> str:
    """Return the part of a SHA-256 that the name of a file of torchvision's ends in, as ``fetch`` wants it."""
    promised = torch.hub.HASH_REGEX.search(file)
    if promised is None:
        raise DownloadError(f"{file} does not have a part of its SHA-256 in its name, so it cannot be checked: give it "
                            "with --from M0=FILE")
    return f"sha256:{promised[1]}"


def _check_cached(name: str, path: Path) -> None:
    """Raise ``DownloadError`` for a damaged file in torch's cache, which may be somebody's: it is not replaced."""
    if path.exists() and not matches(path, None, _checksum(path.name)):
        raise DownloadError(f"the ImageNet weights of {name}: {path} is not the file whose SHA-256 its name states: "
                            "delete it")


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
