"""What the bench works on: images drawn for it, kept as JPEG files, with objects and proposals."""

import json
from pathlib import Path

import torch
from PIL import Image

from altopt.datasets.dataset import DataConfig, Dataset, to_coco
from altopt.datasets.opening import open_dataset
from altopt.machine.randomness import generator
from altopt.ops import boxes as bx
from cache.proposals import ProposalWriter

COUNT = 2  # as many as the largest batch holds
CLASSES = 20  # as VOC; the shapes that are drawn are five of them
PROPOSALS = 2000  # of an image, as stage 2 keeps them


def data_config(size: tuple[int, int]) -> DataConfig:
    """Return the data set of images of (width, height) that ``draw_images`` writes below a data root."""
    name = f"{size[0]}x{size[1]}"
    return DataConfig(format="coco", train=(f"{name}.json:{name}",), test=(f"{name}.json:{name}",))


def draw_images(root: Path, size: tuple[int, int]) -> Dataset:
    """Write images of (width, height) with their annotations as a COCO data set, and return it."""
    name = f"{size[0]}x{size[1]}"
    drawn = open_dataset(DataConfig(format="shapes", train=(f"bench:{COUNT}",), test=(f"bench:{COUNT}",),
                                    width=size[0], height=size[1]), "train", None)
    content = to_coco(drawn)
    (root / name).mkdir()
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.jpg"
        Image.fromarray(drawn.image(str(image["id"]))).save(root / name / image["file_name"], quality=90)
    content["categories"] += [{"id": id, "name": f"class {id}"} for id in range(len(drawn.classes) + 1, CLASSES + 1)]
    (root / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return open_dataset(data_config(size), "train", root)


def write_proposals(path: Path, dataset: Dataset) -> None:
    """Write boxes drawn at random over every image, a quarter of them near an object."""
    with ProposalWriter(path, {"dataset": "bench", "model": "none", "settings": {}}) as writer:
        for id in dataset.ids:
            random = generator("bench proposals", id)
            size = dataset.size(id)
            extent = torch.tensor([*size, *size], dtype=torch.float32)
            corners = torch.rand(PROPOSALS, 2, 2, generator=random).sort(dim=1).values.flatten(1) * extent
            objects = torch.from_numpy(dataset.objects(id).usable().boxes)
            near = objects.repeat(-(-PROPOSALS // (4 * len(objects))), 1)[: PROPOSALS // 4]
            corners[: len(near)] = near + torch.randn(near.shape, generator=random) * 4
            boxes = bx.clip(corners, size)
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            writer.append(id, boxes.numpy(), torch.linspace(1, 0, PROPOSALS).numpy())
