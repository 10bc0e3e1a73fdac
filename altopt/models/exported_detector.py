"""A detector that altopt trained, as a Faster R-CNN of torchvision's. This file needs torch and torchvision alone.

    model = load_detector()           # weights.pth and detector.json, in the folder of this file
    [found] = model([image])          # image: RGB float Tensor[3, H, W] in 0..1, of any size
    found["boxes"], found["scores"], [model.classes[label] for label in found["labels"]]

Boxes are continuous xyxy in pixels of the image; labels count from 1 (0 is background). It does not train."""
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import ops
from torchvision.models.detection import anchor_utils, faster_rcnn, image_list, rpn
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_dtype, to_pil_image


class Sum(nn.Sequential):  # layers side by side on one input, whose outputs are added up
    def forward(self, input: Tensor) -> Tensor:
        return torch.stack([layer(input) for layer in self]).sum(dim=0)
class Concat(nn.Sequential):  # layers side by side on one input, whose channels stand behind each other
    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([layer(input) for layer in self], dim=1)

def layers(plan: dict[str, Any], container: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """Return the layers of {name: [class, arguments]}; the arguments of a container are such a plan again."""
    made = container()
    for name, (kind, arguments) in plan.items():
        cls = {"Sum": Sum, "Concat": Concat}.get(kind) or getattr(nn, kind)
        made.add_module(name, layers(arguments, cls) if issubclass(cls, nn.Sequential) else cls(**arguments))
    return made

class Anchors(anchor_utils.AnchorGenerator):  # 16 pixels apart; torchvision's are image // map, which may be 15 or 17
    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        return super().grid_anchors(grid_sizes, [[torch.full_like(each, 16) for each in strides[0]]])
class RPN(rpn.RegionProposalNetwork):  # drops small boxes before the best are taken; torchvision's does so afterwards
    def filter_proposals(self, proposals: Tensor, objectness: Tensor, sizes: Any, _: Any) -> tuple[list[Tensor], ...]:
        boxes, scores = ops.clip_boxes_to_image(proposals[0], sizes[0]), objectness.flatten().sigmoid()
        kept = (boxes[:, 2:] - boxes[:, :2] >= self.min_size).all(dim=1).nonzero()[:, 0]
        kept = kept[scores[kept].argsort(descending=True, stable=True)[: self.pre_nms_top_n() or None]]
        kept = kept[ops.nms(boxes[kept], scores[kept], self.nms_thresh)[: self.post_nms_top_n()]]
        return [boxes[kept]], [scores[kept]]

class RoIPool(ops.RoIPool):  # rounds to whole cells, and rounds inclusive pixels: the last of a box is its edge less 1
    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Any) -> Tensor:
        return super().forward(features["0"], [each - each.new_tensor([0, 0, 1, 1]) for each in boxes])

class Detector(faster_rcnn.FasterRCNN):
    """Resizes by Pillow, whose filter smooths where it shrinks, and sees each image by itself, without padding."""
    def __init__(self, settings: dict[str, Any]) -> None:
        backbone, anchors, hidden = layers(settings["backbone"]), Anchors(), settings["rpn_channels"]
        backbone.out_channels, anchors.cell_anchors = settings["channels"], [torch.tensor(settings["anchors"])]
        head = rpn.RPNHead(hidden, len(settings["anchors"]))
        head.conv = nn.Sequential(nn.Conv2d(settings["channels"], hidden, 3, padding=1), nn.ReLU())
        predictor = faster_rcnn.FastRCNNPredictor(settings["hidden_size"], len(settings["classes"]))
        super().__init__(backbone, rpn_anchor_generator=anchors, rpn_head=head, box_head=layers(settings["box_head"]),
                         box_predictor=predictor, **settings["torchvision"])
        self.rpn.__class__, self.roi_heads.box_roi_pool = RPN, RoIPool(settings["roi_size"], 1 / 16)
        self.classes, self.order, self.min_side = settings["classes"], settings["order"], settings["min_side"]
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        results = []
        for image in images:
            size = image.shape[-2:]
            scale = min(self.transform.min_size[0] / min(size), self.transform.max_size / max(size))
            target = [max(1, round(side * scale)) for side in size]
            seen = resize(to_pil_image(to_dtype(image.cpu(), torch.uint8, scale=True)), target)
            pixels = pil_to_tensor(seen)[self.order].to(image.device) / 255
            features = {"0": self.backbone(self.transform.normalize(pixels)[None])}
            self.rpn.min_size = self.min_side * scale  # from pixels of the image
            rois = self.rpn(image_list.ImageList(pixels[None], [target]), features)[0]
            found = self.roi_heads(features, rois, [target])[0][0]
            results.append(found | {"boxes": ops.clip_boxes_to_image(found["boxes"] / scale, size)})
        return results

def load_detector(folder: Path = Path(__file__).parent) -> Detector:
    """Return the detector whose weights and settings lie in a folder, on the CPU."""
    model = Detector(json.loads((folder / "detector.json").read_text(encoding="utf-8")))
    model.load_state_dict(torch.load(folder / "weights.pth", map_location="cpu", weights_only=True))
    return model.eval()
