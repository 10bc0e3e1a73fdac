"""The same work by torchvision's Faster R-CNN, in its default form and under autocast.

As in a program of its own, where freed memory goes back to the system: to keep it is altopt's doing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from altopt.batches.samples import Sample
from benchmarks.bench.contender import Contender, Identity, Precision
from benchmarks.bench.stopwatch import Stopwatch
from benchmarks.bench.torchvision_detector import torchvision_detector, torchvision_input
from benchmarks.bench.workplace import Workplace
from stages.shared.detection import Detect
from stages.steps.joint import TrainApproximateJoint

NAMES = ("torchvision_training", "torchvision_detection")


@dataclass(kw_only=True)
class TorchvisionTrained(Contender):
    """torchvision's detector, trained as its users do: autocast around the model, and SGD."""

    read: Callable[[int], list[Sample]]
    device: torch.device

    def step(self, iteration: int) -> None:
        """Read the image and take a step."""
        assert self.optimizer is not None
        with self.watch.part("decode"):
            images, targets = zip(*(torchvision_input(each, self.device) for each in self.read(iteration)),
                                    strict=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.identity.precision == "bfloat16"):
            losses: dict[str, Tensor] = self.module(list(images), list(targets))
            total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


@dataclass(kw_only=True)
class TorchvisionDetecting(Contender):
    """torchvision's detector on an image."""

    read: Callable[[int], list[Sample]]
    device: torch.device

    @torch.inference_mode()
    def step(self, iteration: int) -> None:
        """Read the image and detect."""
        with self.watch.part("decode"):
            images = [torchvision_input(each, self.device)[0] for each in self.read(iteration)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.identity.precision == "bfloat16"):
            found = self.module(images)
        for each in found:
            for tensor in each.values():
                tensor.cpu()


def torchvision_contenders(place: Workplace, names: set[str]) -> Iterator[Contender]:
    """Yield torchvision's detector in its default form and under autocast, training and detecting."""
    if names.isdisjoint(NAMES):
        return
    joint, detect = place.config(TrainApproximateJoint), place.config(Detect)
    model = torchvision_detector(place.learning, place.network, joint, detect, joint.rois_per_batch).to(place.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=joint.momentum, weight_decay=joint.weight_decay)
    _watch_torchvision(place.watch, model, optimizer)
    shared: dict[str, Any] = {"images": 1, "watch": place.watch, "module": model, "read": place.reader(1),
                              "device": place.device, "keeps_memory": False}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        if "torchvision_training" in names:
            yield TorchvisionTrained(identity=Identity("torchvision_training", precision), optimizer=optimizer,
                                     **shared)
        if "torchvision_detection" in names:
            yield TorchvisionDetecting(identity=Identity("torchvision_detection", precision), **shared)


def _watch_torchvision(watch: Stopwatch, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Divide torchvision's steps into the same parts; its RPN makes proposals and losses too, and samples anchors."""
    heads = model.roi_heads
    for module, part in ((model.transform, "decode"), (model.backbone, "trunk"), (model.rpn, "rpn"),
                         (heads.box_roi_pool, "roi_pool"), (heads.box_head, "head"), (heads.box_predictor, "head")):
        watch.watch_module(module, part)
    for owner, name, part in ((model.rpn, "assign_targets_to_anchors", "sampling"),
                              (model.rpn, "fg_bg_sampler", "sampling"),
                              (heads, "select_training_samples", "sampling"),
                              (heads, "postprocess_detections", "head")):
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    watch.watch_training(model, optimizer)
