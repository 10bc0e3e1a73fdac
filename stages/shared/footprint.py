"""What a stage will need of the memory, and the sizes of a network's parts: from shapes alone, before anything runs."""
# The network is built on the meta device, where tensors have shapes and no memory, and an image goes through it there:
# what autograd keeps for the backward pass is counted, for any network.

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altopt.config import NetworkConfig, Precision
from altopt.extents import input_size, scale_of
from altopt.machine.memory import Memory
from altopt.models.detector import FasterRCNN
from altopt.models.region_classifier import RegionClassifier
from altopt.training.loop import freeze, layers_named
from stages.shared.stage_config import PARTS, StageConfig, Trains, TrainsOnData, Work

OVERHEAD = 50_000_000  # threads, readers, open files, what is drawn and never used: as measured, beside torch itself
AT_WORK = 2  # the layer at work holds its input and output, and copies of them in other layouts, or their gradients
Sizes = Iterable[tuple[int, int, int]]  # width, height, how many images


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a stage, beside the program's own."""

    weights: int
    learning: int  # gradients and momentum of what is trained
    activations: int  # at the largest image, with what is kept for the backward pass

    @property
    def least(self) -> int:
        """What it holds whatever its images are."""
        return self.weights + self.learning

    @property
    def total(self) -> int:
        """The estimate: on the CPU between 0.67 and 1.31 of what stages were seen to take beside torch itself."""
        return OVERHEAD + self.least + self.activations


def part_bytes(network: NetworkConfig, num_classes: int) -> dict[str, int]:
    """Return the bytes of each part's weights, as a checkpoint holds them."""
    made = FasterRCNN(network, num_classes)
    return {name: _bytes(part.state_dict().values()) for name, part in made.named_children()}


def hidden_size(network: NetworkConfig) -> int:
    """Return the length of the vectors that RoIs become."""
    return FasterRCNN(network, 1).head.cls_score.in_features


def device_memory(device: str) -> Memory | None:
    """Return what is free of a GPU's memory; None for other devices."""
    if not device.startswith("cuda"):
        return None
    return Memory(torch.cuda.mem_get_info(device)[0], 0)


def footprint(config: StageConfig, network: NetworkConfig, num_classes: int, sizes: Sizes) -> Footprint | None:
    """Return what a stage takes on images of these sizes; None for one that does not say what its work is."""
    work = config.work
    if work is None:
        return None
    made = RegionClassifier(network, num_classes, work.levels) if work.levels else FasterRCNN(network, num_classes)
    if isinstance(config, Trains):
        freeze(made.conv, layers_named(made.conv, config.freeze))
    trains = isinstance(config, TrainsOnData)
    learning = [weight for part in work.parts if trains for weight in getattr(made, part).parameters()
                if weight.requires_grad]
    frames = network.at_scales(config.scales, config.max_side) if config.scales else [network]
    known = list(sizes)
    activations = max(_activations(made, work, _largest(frame, known, work), trains) for frame in frames)
    if isinstance(config, Precision) and config.precision == "bfloat16":
        activations //= 2
    # Of a checkpoint only what is used or saved comes into memory; conv layers run in another layout than it has.
    held = PARTS if config.keeps_parts else work.parts
    weights = sum(_bytes(getattr(made, part).state_dict().values()) for part in (*held, "conv"))
    return Footprint(weights, 2 * _bytes(learning), activations)


def _largest(frame: NetworkConfig, sizes: list[tuple[int, int, int]], work: Work) -> tuple[int, int]:
    """Return (width, height) of the largest image that the network gets to see."""
    if work.side or not sizes:
        return work.side, work.side
    seen = (input_size((width, height), scale_of((width, height), frame.short_side, frame.max_side))
            for width, height, _ in sizes)
    return max(seen, key=lambda size: size[0] * size[1])


def _activations(made: "FasterRCNN | RegionClassifier", work: Work, size: tuple[int, int], trains: bool) -> int:
    """Return the bytes of what the layers make of a batch of images of one (width, height)."""
    # Frozen conv layers see each image by itself; see altopt/models/trunk.py.
    learns = trains and any(weight.requires_grad for weight in made.conv.parameters())
    images = work.images if learns or not trains else min(work.images, 1)
    meter = _Meter(made)
    pixels = torch.empty(images, 3, size[1], size[0], device="meta")
    with meter, torch.set_grad_enabled(trains):
        if images:
            maps: Tensor = made.conv(pixels)
            if "rpn" in work.parts:
                made.get_submodule("rpn")(maps)
        if work.rois:
            width = made.pooled_size if isinstance(made, RegionClassifier) else maps.shape[1] * made.roi_size**2
            pooled = torch.empty(work.rois, width, device="meta", requires_grad=learns)
            made.head(made.fc(pooled))
            meter.kept[0] = 2 * _bytes([pooled])  # pooled RoIs, and where in the map each value was found
    return 4 * pixels.numel() + sum(meter.kept.values()) + AT_WORK * meter.largest


class _Meter:
    """While it is open: the bytes of what autograd keeps, by storage, and of the largest layer's input and output."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.largest = network, 0
        self.kept: dict[int, int] = {}
        self._storages: list[torch.UntypedStorage] = []  # held, so that none gets the number of another
        self._weights = {weight.untyped_storage()._cdata for weight in network.parameters()}

    def __enter__(self) -> None:
        self._hooks = [layer.register_forward_hook(self._ran) for layer in self.network.modules()
                       if not list(layer.children())]
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._saving.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._saving.__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._storages.append(storage)
            self.kept[storage._cdata] = storage.nbytes()
        return tensor

    def _ran(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.largest = max(self.largest, _bytes([each for each in (*inputs, output) if isinstance(each, Tensor)]))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
