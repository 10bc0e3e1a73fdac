"""A trained network without its data set: what it finds, and what names it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import open_tiny

from altopt.config import DetectionSettings
from altopt.datasets.dataset import to_coco
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, DataError, UsageError
from cache.checkpoints import load_checkpoint, save_checkpoint
from stages.pipeline.detector import load_detector, network_files


@pytest.fixture
def photographs(copied):
    """The run's test images as files of several kinds in photos/, and as a COCO data set, which --set can name."""
    folder = copied.parents[1] / "photos"
    folder.mkdir()
    run = open_tiny(copied)
    dataset = open_dataset(run.recipe.data, "test", None)
    content = to_coco(dataset)
    kinds = [("jpg", "RGB"), ("jpg", "L"), ("png", "RGB"), ("png", "P")]
    for entry, id, (suffix, mode) in zip(content["images"], dataset.ids, kinds, strict=True):
        entry["file_name"] = f"{id}.{suffix}"
        Image.fromarray(dataset.image(id)).convert(mode).save(folder / entry["file_name"])
    (folder / "test.json").write_text(json.dumps(content))
    return folder


CLASSES = ("circle", "square", "triangle", "cross", "ring")
ON_FILES = ["--set", 'data.format="coco"', "--set", 'data.train=["photos/test.json:photos"]', "--set",
            'data.test=["photos/test.json:photos"]', "--data-root", ".", "--set", "detect.images_per_batch=1"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("network", "artifact"), [("M5", "D5"), ("M1+M2", "D2")])
def test_detections_are_those_of_evaluate_to_the_last_bit(altopt, copied, photographs, network, artifact, precision):
    setting = ["--set", f"detect.precision={precision}"]
    assert altopt("evaluate", network, "--run", "tiny", *ON_FILES, *setting, "--json").code == 0
    evaluated = json.loads((copied / f"{artifact}.detections.json").read_text())
    files = {entry["id"]: entry["file_name"] for entry in json.loads((photographs / "test.json").read_text())["images"]}
    expected = [{**each, "image_id": files[each["image_id"]]} for each in evaluated]
    answer = altopt("predict", network, "photos", "--run", "tiny", "--score", "0.05", "--json", *setting)
    assert answer.code == 0
    found = json.loads(answer.out)
    for each in found:
        assert each.pop("category") == CLASSES[each["category_id"] - 1]
    assert found == expected
    assert {each["image_id"] for each in found} == set(files.values())


def test_a_file_and_its_pixels_give_the_same(copied, photographs):
    detector = load_detector("M5", run="tiny")
    path = photographs / "test-00000.jpg"
    with Image.open(path) as image:
        pixels = np.asarray(image)
    results = [detector.detect(each) for each in (path, str(path), pixels, pixels[:, ::-1][:, ::-1])]
    assert len(results[0]) > 0
    for each in results:
        assert (each.boxes == results[0].boxes).all()
        assert (each.scores == results[0].scores).all()
        assert (np.diff(each.scores) <= 0).all()
    assert detector.classes == CLASSES


def test_boxes_are_in_the_frame_that_is_displayed(copied, photographs):
    detector = load_detector("M5", run="tiny")
    with Image.open(photographs / "test-00002.png") as image:
        upright = np.asarray(image.convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(np.rot90(upright)).save("turned.png", exif=exif)
    assert (detector.detect("turned.png").boxes == detector.detect(upright).boxes).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (600, 100), (100, 600), (5000, 5000)])
def test_images_of_any_extent(copied, size):
    found = load_detector("M5", run="tiny").detect(np.full((size[1], size[0], 3), 90, np.uint8))
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [*size, *size]).all()


def test_an_image_without_detections(copied):
    found = load_detector("M5", run="tiny", sets=["detect.score=1"]).detect(np.zeros((80, 96, 3), np.uint8))
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


@pytest.mark.parametrize("array", [np.zeros((80, 96), np.uint8), np.zeros((80, 96, 4), np.uint8),
                                   np.zeros((80, 96, 3), np.float32), np.zeros((0, 96, 3), np.uint8)])
def test_arrays_of_another_kind(copied, array):
    with pytest.raises(ValueError, match=r"an image is uint8 \[H, W, 3\]"):
        load_detector("M5", run="tiny").detect(array)


def test_what_is_too_narrow_for_the_network_is_named(copied):
    detector = load_detector("M5", run="tiny")
    with pytest.raises(DataError, match="the image has 3000 x 1 pixels, too narrow for the network"):
        detector.detect(np.zeros((1, 3000, 3), np.uint8))
    Image.new("RGB", (2, 2000)).save("thin.png")
    with pytest.raises(DataError, match=r"thin\.png has 2 x 2000 pixels, too narrow"):
        detector.detect("thin.png")


def test_settings_are_the_runs_or_the_defaults(copied):
    of_run = load_detector("M5", run="tiny").settings
    assert (of_run.proposals, of_run.min_side) == (40, 4)
    assert load_detector(str(copied / "M5.safetensors")).settings == of_run
    shutil.copy(copied / "M5.safetensors", "mine.safetensors")
    assert load_detector("mine.safetensors").settings == DetectionSettings()
    for name in ("mine.safetensors", "runs/tiny"):
        assert load_detector(name, sets=["detect.nms=0.5"]).settings.nms == 0.5
    assert load_detector("mine.safetensors", sets=["detect.nms=0.5"]).settings == DetectionSettings(nms=0.5)


@pytest.mark.parametrize(("network", "run", "files"), [
    ("M5", "tiny", ["M5"]), ("m5", "tiny", ["M5"]), ("M1+M2", "tiny", ["M1", "M2"]), ("runs/tiny", None, ["M5"]),
    ("tiny", None, ["M5"]), ("runs/tiny/M5.safetensors", None, ["M5"]),
    ("runs/tiny/M1.safetensors+runs/tiny/M2.safetensors", None, ["M1", "M2"])])
def test_names_of_networks(copied, network, run, files):
    assert network_files(network, run) == [copied.relative_to(copied.parents[1]) / f"{name}.safetensors"
                                           for name in files]


def test_a_file_may_have_a_plus_in_its_name(copied):
    shutil.copy(copied / "M5.safetensors", "M1+M2.safetensors")
    assert [str(path) for path in network_files("M1+M2.safetensors", None)] == ["M1+M2.safetensors"]


def test_the_final_network_is_the_schemes(copied):
    text = (copied / "recipe.toml").read_text()
    (copied / "recipe.toml").write_text(text.replace('title = "tiny"\n', 'title = "tiny"\nscheme = "exact-joint"\n'))
    assert [path.name for path in network_files("tiny", None)] == ["M1.safetensors"]


@pytest.mark.parametrize(("network", "run", "error", "words"), [
    ("M1", "tiny", ArtifactError, "M1.safetensors does not hold fc layers or a head: give a network with RPN and head"),
    ("M2", "tiny", ArtifactError, "M2.safetensors does not hold an RPN: give"),
    ("M0", "tiny", ArtifactError, "M0.safetensors does not hold an RPN"),
    ("M2+M1", "tiny", ArtifactError, "M2.safetensors does not hold an RPN"),
    ("M9", "tiny", ArtifactError, "M9 is not in runs/tiny: make it with altopt stage M9"),
    ("M5", None, ArtifactError, "M5 is not in runs/shapes: make it with altopt stage M5, or name another run"),
    ("M1+M2+M5", "tiny", UsageError, "names 3 networks"),
    ("P1", "tiny", UsageError, "'P1' is not a network of the run tiny"),
    ("P1", None, UsageError, "there is no network 'P1': give M5 or M1[+]M2"),
    ("photo.jpg", None, UsageError, "there is no network 'photo.jpg'"),
    ("runs/tiny/M5.safetensors", "tiny", UsageError, "leave --run out"),
    ("runs", None, UsageError, "runs is not a run's folder, it has no recipe.toml: give M5"),
    ("weights.pth", None, ArtifactError, "weights.pth is not a .safetensors file of altopt's"),
    ("foreign.safetensors", None, ArtifactError, "foreign.safetensors does not hold an RPN"),
    ("text.safetensors", None, ArtifactError, "text.safetensors is corrupt or not a checkpoint"),
    ("runs/../M5", None, UsageError, "there is no network"), ("", None, UsageError, "not a run's folder"),
])
def test_what_names_no_detector(copied, network, run, error, words):
    torch.save({"weight": torch.zeros(1)}, "weights.pth")
    save_checkpoint(copied.parents[1] / "foreign.safetensors", {"weight": torch.zeros(1)}, {})
    (copied.parents[1] / "text.safetensors").write_text("no weights")
    with pytest.raises(error, match=words) as caught:
        load_detector(network, run=run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"network": None}, "holds no network known to altopt"),
    ({"network": {"name": "resnet9000"}}, "network.name must be one of"),
    ({"network": {"name": "small", "rpn_channels": "many"}}, "network.rpn_channels must be a whole number"),
    ({"classes": None}, "does not say its classes"), ({"classes": [1, 2]}, "does not say its classes"),
    ({"classes": ["one"]}, "has no head layers"),
])
def test_descriptions_that_cannot_be(copied, changes, words):
    tensors, description = load_checkpoint(copied / "M5.safetensors")
    path = copied.parents[1] / "other.safetensors"
    save_checkpoint(path, tensors, description | changes)
    with pytest.raises(ArtifactError, match=f"other.safetensors.*{words}"):
        load_detector(path)


def test_two_networks_are_of_one_kind(copied):
    tensors, description = load_checkpoint(copied / "M2.safetensors")
    save_checkpoint(copied.parents[1] / "other.safetensors", tensors,
                    description | {"network": description["network"] | {"name": "vgg16"}})
    with pytest.raises(ArtifactError, match=r"M1\.safetensors holds small and other\.safetensors vgg16"):
        load_detector("runs/tiny/M1.safetensors+other.safetensors")


@pytest.mark.parametrize(("setting", "words"), [
    ("train_rpn.lr=1", "--set train_rpn.lr=1: what is trained detects by these settings alone"),
    ("detect.images_per_batch=2", "these settings alone"), ("detect.nsm=0.5", "did you mean 'detect.nms'"),
    ("detect.nms=2", "detect.nms must be at most 1"), ("detect.nms", "write TABLE.FIELD=VALUE")])
@pytest.mark.parametrize("network", ["runs/tiny", "mine.safetensors"])
def test_settings_of_something_else(copied, network, setting, words):
    shutil.copy(copied / "M5.safetensors", "mine.safetensors")
    with pytest.raises(UsageError) as caught:
        load_detector(network, sets=[setting])
    assert words in str(caught.value)


def test_weights_in_bfloat16(copied):
    tensors, description = load_checkpoint(copied / "M5.safetensors")
    save_checkpoint(copied.parents[1] / "half.safetensors", {name: each.to(torch.bfloat16) if each.is_floating_point()
                                                             else each for name, each in tensors.items()}, description)
    image = np.random.default_rng(0).integers(0, 256, (80, 96, 3)).astype(np.uint8)
    found = load_detector("half.safetensors").detect(image)
    assert len(found) > 0
    assert found.scores.dtype == np.float32


def test_weights_bring_their_pixels(copied):
    """A network with its first layer turned round, and told so, finds what it did."""
    image = open_dataset(open_tiny(copied).recipe.data, "test", None).image("test-00000")
    expected = load_detector("M5", run="tiny").detect(image)
    tensors, description = load_checkpoint(copied / "M5.safetensors")
    usual = description["pixels"]
    mirrored = usual | {"order": "BGR", "mean": usual["mean"][::-1], "std": usual["std"][::-1]}
    first = "conv.conv1.0.weight"
    path = copied / "M6.safetensors"  # in the run, whose settings it takes
    save_checkpoint(path, tensors | {first: tensors[first].flip(1).contiguous()}, description | {"pixels": mirrored})
    found = load_detector(path).detect(image)
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    with pytest.raises(ArtifactError, match="want an image's values differently"):
        load_detector(f"runs/tiny/M1.safetensors+{path}")
