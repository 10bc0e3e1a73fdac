"""altopt export: what is written, that it works by itself, and that nothing is lost."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_networks import found_by, share_found
from PIL import Image
from pycocotools.coco import COCO
from tiny_runs import open_tiny

from altopt.datasets.opening import open_dataset
from altopt.evaluation.detections import Detections, read_detections
from altopt.evaluation.scoring import score
from altopt.evaluation.voc import comp4_lines
from cache.checkpoints import load_checkpoint, save_checkpoint
from stages.pipeline.detector import load_detector

Json = dict[str, Any]


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
    needed = {name.split(".")[0] for node in ast.walk(ast.parse(loader)) if isinstance(node, ast.Import | ast.ImportFrom)
              for name in ([node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])}
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
    assert metadata["source"] == "M5.safetensors"
    detector = load_detector(source, sets=("detect.score=0.01",), device="cpu")
    assert json.loads(metadata["classes"]) == list(detector.classes)
    for image in images_of(open_tiny(copied)).values():
        boxes, scores, labels = session.run(None, {"image": image})
        assert share_found(detector.detect(image), Detections(boxes, scores, labels)) >= 0.99
