"""Before the seven stages: M0, the pre-trained network that stages 1 and 3 both start from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from altopt.config import SHARE, NetworkConfig, Pixels, setting
from altopt.errors import ArtifactError
from stages.shared.events import ImagesDone
from stages.shared.stage_config import StageConfig, TrainsOnData, Work
from stages.shared.step import Facts, Runtime

if TYPE_CHECKING:
    from torch import Tensor

    from altopt.batches.reading import Entry
    from altopt.batches.samples import Sample


@dataclass(frozen=True, kw_only=True)
class LoadImageNetWeights(StageConfig):
    """ImageNet weights of the network, by torchvision."""

    backbone: str

    def require_packages(self) -> None:
        """Some weights are in a package of their own."""
        if self.backbone == "efficientnet_lite0":
            from altopt.models.lite0 import packaged_weights

            packaged_weights()


@dataclass(frozen=True, kw_only=True)
class PretrainOnCrops(TrainsOnData):
    """Classification of crops, a short stand-in for ImageNet."""

    backbone: str
    crop_side: int = setting(64, "four cells of the last feature map", at_least=16)
    background: float = setting(0.2, "chosen: enough to learn what noise looks like", **SHARE)

    @property
    def work(self) -> Work:
        """A batch of crops through the conv layers."""
        return Work(("conv",), self.images_per_batch, side=self.crop_side)


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
    from altopt.models.imagenet import CAFFE_PIXELS
    from cache.checkpoints import save_checkpoint

    tensors, description = read_weights(source, network)
    save_checkpoint(out, tensors, description)
    if Pixels.of(description) != CAFFE_PIXELS:
        return ""
    return (f"{source.name} has Caffe's convention: its small first layer wants BGR, 0 to 255, less the mean, and gets "
            "it in every stage")


def read_weights(source: Path, network: NetworkConfig) -> "tuple[Mapping[str, Tensor], Mapping[str, object]]":
    """Return the tensors of such a file under altopt's names, and their description; ``ArtifactError`` as above.

    Raises it too when layers of the network are missing or have another shape.
    """
    import torch

    from altopt.models import backbones
    from altopt.models.imagenet import from_foreign, pixels_of
    from cache.checkpoints import load_state_dict, read_description
    from stages.shared.training import require_network

    tensors = load_state_dict(source)
    own = any(name.startswith("conv.conv1.") for name in tensors)
    if own:
        require_network(source, read_description(source), network)
    else:
        tensors = from_foreign(network.name, tensors, source.name)
    with torch.device("meta"):
        conv = backbones.build(network.name).conv
    for name, wanted in conv.state_dict(prefix="conv.").items():
        if name not in tensors or tensors[name].shape != wanted.shape:
            raise ArtifactError(f"{source.name} has no {name} of shape {tuple(wanted.shape)}: it is not a whole "
                                f"{network.name}, so give another file")
    if own:
        return tensors, read_description(source)
    return tensors, _description(network.name, pixels_of(network.name, tensors, source.name))
