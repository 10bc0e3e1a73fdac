"""ImageNet weights: where they come from, with their hash checked, their names here, and the pixels that they want."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from altopt.config import Pixels
from altopt.datasets.download import Progress, fetch, hash_of, matches
from altopt.errors import ArtifactError, DownloadError
from altopt.models import backbones, lite0

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the file in the pip package
CAFFE_PIXELS = Pixels("BGR", 1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))  # py-faster-rcnn PIXEL_MEANS
# A first layer that was trained on 0..255 less the mean has weights about 58 times smaller than torchvision's, and
# Caffe's files have no other mark. In between, nobody knows.
CLEARLY_USUAL, CLEARLY_CAFFE = 1 / 5, 1 / 20


def imagenet_weights(name: str, progress: Progress | None = None) -> tuple[dict[str, Tensor], str]:
    """Return a network's ImageNet weights, under altopt's names, and the name of their file.

    ``progress`` is told of a download. Raises ``ArtifactError`` for a network that has none, and ``DownloadError``.
    """
    if name == "efficientnet_lite0":
        path = Path(lite0.packaged_weights())
        digest = hash_of(path, "sha256")
        if digest != LITE0_SHA256:
            raise ArtifactError(f"{path} has sha256 {digest[:8]}, not {LITE0_SHA256[:8]}: install the package anew")
        return from_foreign(name, torch.load(path, map_location="cpu", weights_only=True), path.name), path.name
    url = imagenet_url(name)
    source = url.rsplit("/", 1)[-1]
    return from_foreign(name, download(name, url, progress), source), source


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


def from_foreign(name: str, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the tensors of torchvision's file, or the pip package's, under altopt's: ``conv.<block>.<n>.weight``, ...

    ``source`` names the file in messages. Raises ``ArtifactError`` for a tensor that is missing or of another shape.
    """
    with torch.device("meta"):
        backbone = backbones.build(name)
    names = backbone.names
    if name == "efficientnet_lite0":
        state = lite0.folded(state)
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
                raise ArtifactError(f"{source} has no tensor {theirs}: it does not hold ImageNet weights of {name}")
            if tensor.shape != wanted.shape:
                raise ArtifactError(f"{source}: {theirs} is {tuple(tensor.shape)}, and {name} needs "
                                    f"{tuple(wanted.shape)}")
            tensors[f"{part}.{key}"] = tensor.float()
    return tensors


def pixels_of(name: str, tensors: Mapping[str, Tensor], source: str) -> Pixels:
    """Return what a network's weights want of an image, as the spread of their first layer shows it.

    Raises ``ArtifactError`` where it does not.
    """
    with torch.device("meta"):
        backbone = backbones.build(name)
    spread = tensors["conv.conv1.0.weight"].std().item()
    if not backbone.first_spread or spread > backbone.first_spread * CLEARLY_USUAL:
        return backbone.pixels
    if spread < backbone.first_spread * CLEARLY_CAFFE:
        return CAFFE_PIXELS
    raise ArtifactError(f"{source}: its first layer has weights that spread by {spread:.3g}, torchvision's by about "
                        f"{backbone.first_spread:g} and Caffe's by a 58th of that: bring weights whose origin you know")
