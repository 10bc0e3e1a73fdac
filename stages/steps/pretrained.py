"""Before the seven stages: M0, the pre-trained network that stages 1 and 3 both start from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from altopt.config import SHARE, NetworkConfig, Pixels, setting
from stages.shared.events import ImagesDone
from stages.shared.stage_config import StageConfig, TrainsOnData
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from altopt.batches.reading import Entry
    from altopt.batches.samples import Sample


@dataclass(frozen=True, kw_only=True)
class LoadImageNetWeights(StageConfig):
    """ImageNet weights of the network, by torchvision."""

    backbone: str


@dataclass(frozen=True, kw_only=True)
class PretrainOnCrops(TrainsOnData):
    """Classification of crops, a short stand-in for ImageNet."""

    backbone: str
    crop_side: int = setting(64, "four cells of the last feature map", at_least=16)
    background: float = setting(0.2, "chosen: enough to learn what noise looks like", **SHARE)


def load_imagenet_weights(*, out: Path, config: LoadImageNetWeights, runtime: Runtime) -> Facts:
    """Take the network's ImageNet weights from torchvision, with their hash checked."""
    from altopt.models.imagenet import imagenet_weights, pixels_of
    from cache.checkpoints import save_checkpoint

    def progress(done: int, total: int) -> None:
        runtime.report(ImagesDone(done // 1_000_000, total // 1_000_000, "MB"))

    tensors, file = imagenet_weights(config.backbone, progress)
    save_checkpoint(out, tensors, _description(config.backbone, pixels_of(config.backbone, tensors, file)))
    return {"file": file}


def pretrain_on_crops(*, out: Path, config: PretrainOnCrops, runtime: Runtime) -> Facts:
    """Train the network to classify crops of the training split's objects ("stage 0")."""
    from altopt.machine.randomness import generator
    from altopt.models import backbones
    from altopt.models.classification import CropClassifier, draw_crop
    from altopt.models.network_parts import initialise_all
    from cache.checkpoints import save_checkpoint
    from stages.shared.training import TrainedStage

    training = TrainedStage("pretrain_on_crops", out, config, runtime)
    dataset = training.dataset
    module = CropClassifier(backbones.build(config.backbone), len(dataset.classes))
    initialise_all(module, generator(*training.seed, "weights"))

    def read(entry: "Entry", iteration: int) -> "Sample":
        return draw_crop(dataset, entry.id, config.crop_side, config.background, *training.seed, iteration)

    facts = training.run(module, training.entries(), read)
    save_checkpoint(out, module.tensors(), _description(config.backbone, training.pixels, dataset.classes))
    training.snapshot.unlink(missing_ok=True)
    return facts


def _description(name: str, pixels: Pixels, classes: Sequence[str] = ()) -> dict[str, object]:
    return {"network": {"name": name}, "classes": list(classes), "pixels": asdict(pixels)}


def import_weights(source: Path, out: Path, network: NetworkConfig) -> str:
    """Write ``out`` from a file of the user's: a checkpoint of altopt's, or another program's ImageNet weights.

    Returns in words what was found, where that is worth saying. Raises ``ArtifactError`` when the file is missing,
    foreign, or would execute code on loading.
    """
    from altopt.models.imagenet import CAFFE_PIXELS, from_foreign, pixels_of
    from cache.checkpoints import load_state_dict, read_description, save_checkpoint
    from stages.shared.training import require_network

    tensors = load_state_dict(source)
    if any(name.startswith("conv.conv1.") for name in tensors):
        description = read_description(source)
        require_network(source, description, network)
        pixels = Pixels.of(description)
    else:
        tensors = from_foreign(network.name, tensors, source.name)
        pixels = pixels_of(network.name, tensors, source.name)
        description = _description(network.name, pixels)
    save_checkpoint(out, tensors, description)
    if pixels != CAFFE_PIXELS:
        return ""
    return (f"{source.name} has Caffe's convention: its small first layer wants BGR, 0 to 255, less the mean, and gets "
            "it in every stage")
