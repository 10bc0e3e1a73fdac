"""altopt export: what is written, that it works by itself, and that nothing is lost."""

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_networks import share_found
from PIL import Image
from pycocotools.coco import COCO
from tiny_runs import open_tiny

from altopt.datasets.opening import open_dataset
from altopt.evaluation.detections import Detections, read_detections
from altopt.evaluation.scoring import score
from altopt.evaluation.voc import comp4_lines
from cache.checkpoints import load_checkpoint, save_checkpoint
from stages.pipeline.detector import load_detector
from stages.pipeline.exporting import SPLITS


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def load_written(folder: Path) -> Any:
    """The detector in a folder, by the loader beside it."""
    spec = importlib.util.spec_from_file_location("altopt_detector", folder / "altopt_detector.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_detector()


def images_of(run: Any) -> dict[str, np.ndarray]:
    dataset = open_dataset(run.recipe.data, "test", None)
    return {image_id: dataset.image(image_id) for image_id in dataset.ids}


def test_torchvision_gets_a_folder_that_needs_nothing_else(copied, altopt):
    answer = altopt("export", "m5", "--format", "torchvision", "--run", "tiny", "--set", "detect.score=0.01")
    folder = Path("M5-torchvision")
    written = [folder / name for name in ("weights.pth", "detector.json", "altopt_detector.py")]
    assert (answer.code, answer.out.split()) == (0, [str(path) for path in written])
    assert sorted(folder.iterdir()) == sorted(written)
    state = torch.load(written[0], weights_only=True)
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    loader = written[2].read_text()
    assert len(loader.splitlines()) <= 80
    needed = {name.split(".")[0] for name in imported(written[2])}
    assert needed - set(sys.stdlib_module_names) == {"torch", "torchvision"}
    run = open_tiny(copied)
    model = load_written(folder)
    assert model.classes == ["__background__", *open_dataset(run.recipe.data, "test", None).classes]
    detector = load_detector(copied / "M5.safetensors", sets=("detect.score=0.01",), device="cpu")
    for image in images_of(run).values():
        ours = detector.detect(image)
        with torch.inference_mode():
            [found] = model([torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255])
        theirs = Detections(found["boxes"].numpy(), found["scores"].numpy(), found["labels"].numpy() - 1)
        assert len(ours) > 10
        assert share_found(ours, theirs) >= 0.99


def test_onnx_gets_one_file(copied, altopt):
    pytest.importorskip("onnx", reason="needs onnx: pip install -e '.[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[onnx]'")
    source = copied / "M5.safetensors"
    answer = altopt("export", source, "--format", "onnx", "--out", "sub/my.onnx", "--json", "--set",
                    "detect.score=0.01")
    assert json.loads(answer.out) == {"exported": str(source), "format": "onnx", "files": ["sub/my.onnx"]}
    session = runtime.InferenceSession("sub/my.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["source"] == "M5"
    detector = load_detector(source, sets=("detect.score=0.01",), device="cpu")
    assert json.loads(metadata["classes"]) == list(detector.classes)
    for image in images_of(open_tiny(copied)).values():
        boxes, scores, labels = session.run(None, {"image": image})
        assert share_found(detector.detect(image), Detections(boxes, scores, labels)) >= 0.99


def test_what_is_there_stays_unless_forced(copied, altopt):
    Path("M5-torchvision").mkdir()
    there = Path("M5-torchvision/detector.json")
    there.write_text("mine")
    command = ("export", "M5", "--format", "torchvision", "--run", "tiny")
    refused = altopt(*command)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (f"altopt: {there} is there already: name another place with --out, or write over it with "
                           "--force\n")
    assert [path.name for path in Path("M5-torchvision").iterdir()] == ["detector.json"]
    assert there.read_text() == "mine"
    assert altopt(*command, "--force").code == 0
    assert "classes" in json.loads(there.read_text())


@pytest.mark.parametrize(("what", "form", "said"), [
    ("M5", "coco", "M5 is a network, and there is no coco of that: choose --format torchvision or onnx"),
    ("D5", "onnx", "D5 is detections, and there is no onnx of that: choose --format coco or voc-comp4"),
    ("data", "voc-comp4", "data is the data set, and there is no voc-comp4 of that: choose --format coco"),
    ("M1+M2", "onnx", "M1+M2 are two networks, and an export holds one: name one with RPN and head, such as M5"),
])
def test_what_a_format_cannot_hold_is_said_in_a_line(copied, altopt, what, form, said):
    answer = altopt("export", what, "--format", form, "--run", "tiny")
    assert (answer.code, answer.out, answer.err) == (2, "", f"altopt: {said}\n")


@pytest.mark.parametrize(("what", "code"), [("M1", 4), ("M9", 4), ("D9", 4), ("nowhere.safetensors", 2)])
def test_what_is_not_there_or_lacks_a_part_is_said_in_a_line(copied, altopt, what, code):
    answer = altopt("export", what, "--format", "coco" if what[0] == "D" else "torchvision", "--run", "tiny")
    assert (answer.code, answer.out, answer.err.count("\n")) == (code, "", 1)
    assert what.split(".")[0] in answer.err
    assert not list(Path().glob("*-torchvision"))


def test_sampled_rois_are_refused(copied, altopt):
    tensors, description = load_checkpoint(copied / "M5.safetensors")
    save_checkpoint(Path("sampled.safetensors"), tensors, description | {"samples_per_bin": 2})
    answer = altopt("export", "sampled.safetensors", "--format", "torchvision")
    assert answer.code == 2
    assert "samples RoIs bilinearly" in answer.err
    assert not Path("sampled-torchvision").exists()


def test_without_onnx_the_extra_is_named(copied, altopt, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("stages.pipeline.exporting.find_spec", lambda name: None)
    answer = altopt("export", "M5", "--format", "onnx", "--run", "tiny")
    assert answer.code == 2
    assert "pip install -e '.[onnx]'" in answer.err


def test_detections_as_coco_are_those_of_the_run(copied, altopt):
    assert altopt("export", "d5", "--format", "coco", "--run", "tiny").out == "D5.coco.json\n"
    Path("there").mkdir()
    assert altopt("export", "d5", "--format", "coco", "--run", "tiny", "--out", "there").out == "there/D5.coco.json\n"
    assert json.loads(Path("D5.coco.json").read_text()) == json.loads((copied / "D5.detections.json").read_text())


def test_detections_as_the_devkit_reads_them_score_the_same(copied, altopt):
    run = open_tiny(copied)
    dataset = open_dataset(run.recipe.data, "test", None)
    answer = altopt("export", "D5", "--format", "voc-comp4", "--run", "tiny")
    assert answer.out.split() == [f"D5-voc-comp4/comp4_det_test_{name}.txt" for name in dataset.classes]
    rows: dict[str, list[tuple[float, ...]]] = {image_id: [] for image_id in dataset.ids}
    for label, path in enumerate(answer.out.split()):
        for line in Path(path).read_text().splitlines():
            image_id, *numbers = line.split(" ")
            assert all(len(number.split(".")[1]) == 6 for number in numbers)
            rows[image_id].append((*map(float, numbers), label))
    ours = read_detections(copied / "D5.detections.json", dataset.ids, dataset.category_ids)
    theirs = {}
    for image_id, found in rows.items():
        table = np.array(found).reshape(-1, 6)
        theirs[image_id] = Detections(table[:, 1:5] - [1, 1, 0, 0], table[:, 0], table[:, 5].astype(int))
        assert len(ours[image_id]) == len(theirs[image_id])
    truth = {image_id: dataset.objects(image_id) for image_id in dataset.ids}
    maps = [score("voc07", truth, each, dataset.classes).as_dict()["map"] for each in (ours, theirs)]
    assert maps[0] == pytest.approx(maps[1], abs=1e-6)


def test_a_line_of_the_devkits_counts_pixels_from_one():
    found = {"000007": Detections(np.array([[0.0, 9.5, 20.0, 30.25], [1, 1, 2, 2]]), np.array([0.75, 0.5]),
                                  np.array([1, 0]))}
    assert list(comp4_lines(found, 1)) == ["000007 0.750000 1.000000 10.500000 20.000000 30.250000\n"]


def test_shapes_as_coco_come_with_their_images(copied, altopt):
    answer = altopt("export", "data", "--format", "coco", "--run", "tiny", "--out", "mine")
    assert answer.out.split() == ["mine/train.json", "mine/test.json"]
    run = open_tiny(copied)
    for split in SPLITS:
        truth, dataset = COCO(f"mine/{split}.json"), open_dataset(run.recipe.data, split, None)
        assert [each["name"] for each in truth.loadCats(truth.getCatIds())] == list(dataset.classes)
        for image_id, image in truth.imgs.items():
            assert np.array_equal(np.asarray(Image.open(image["file_name"])), dataset.image(image_id))
            corners = dataset.objects(image_id).boxes[:, :2]
            assert [each["bbox"][:2] for each in truth.imgToAnns[image_id]] == corners.tolist()
    assert altopt("export", "data", "--format", "coco", "--run", "tiny", "--out", "mine").code == 2
    Path("mine/train.json").unlink()
    Path("mine/test.json").unlink()
    assert "mine/images is there already" in altopt(
        "export", "data", "--format", "coco", "--run", "tiny", "--out", "mine").err


def test_images_on_the_disk_are_named_where_they_lie(workplace, altopt):
    Path("data/images").mkdir(parents=True)
    Image.new("RGB", (60, 50)).save("data/images/a.png")
    categories, image = [{"id": 7, "name": "cat"}], {"id": 3, "file_name": "a.png", "width": 60, "height": 50}
    box = {"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 2, 30, 40], "area": 900, "iscrowd": 0}
    Path("data/some.json").write_text(json.dumps({"images": [image], "categories": categories, "annotations": [box]}))
    recipe = Path("mine.toml")
    recipe.write_text('title = "mine"\ndata_root = "data"\n[network]\nname = "small"\n[data]\nformat = "coco"\n'
                      'train = ["some.json:images"]\ntest = ["some.json:images"]\n')
    answer = altopt("export", "data", "--format", "coco", "--recipe", recipe)
    assert (answer.code, answer.err) == (0, "")
    content = json.loads(Path("data-coco/test.json").read_text())
    assert content["images"] == [image | {"file_name": str(Path("data/images/a.png").absolute())}]
    assert content["annotations"] == [box | {"difficult": 0}]
    assert not Path("data-coco/images").exists()
