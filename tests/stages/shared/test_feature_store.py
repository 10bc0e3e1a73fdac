"""Stages on stored maps and without: the same bytes, on five photographs of different sizes."""

import multiprocessing
import shutil
import signal
from dataclasses import replace
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY, Reports, hashes, link_or_copy, make_all, open_tiny, work_until_killed, write_recipe

from altopt.batches.samples import make_batch, read_sample
from altopt.config import TORCHVISION_PIXELS, Pixels
from altopt.models.trunk import image_maps
from cache.features import FeatureMapFile, FeatureMapWriter
from cache.files import sha256_file
from cache.preallocated import growing_path
from stages.pipeline.run import find_step
from stages.shared.events import ImagesDone
from stages.shared.feature_plan import FOLDER
from stages.shared.feature_store import FeatureStore
from stages.shared.inference import Inference
from stages.shared.step import Step
from stages.steps.joint import train_approximate_joint, train_exact_joint

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torchvision", "h5py"])

SIZES = [(96, 80), (80, 96), (70, 90), (112, 64), (64, 64)]
LEARNING, FROZEN = ("M1", "P1", "M2"), ("M3", "P2", "M4", "M5")
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
SHAPES_DATA = TINY[TINY.index("[data]"):TINY.index("[all]")]
VOC_DATA = """\
[data]
format = "voc"
train = ["trainval"]
test = ["trainval"]

"""
MAPS = 2 * len(SIZES)


@pytest.fixture(scope="module", autouse=True)
def _server_starts_while_other_tests_run():
    forkserver.ensure_running()


def write_images(root):
    """Five images in VOC layout; the last one shows nothing."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for k, (width, height) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{k}.png")
        objects = "".join(OBJECT.format(*each) for each in (("cat", 5, 8, 34, 40), ("dog", 20, 12, 60, 60))[: 4 - k])
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (root / "Annotations" / f"{k}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("".join(f"{k}\n" for k in range(len(SIZES))))


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A whole run that stores nothing; not to be changed."""
    folder = tmp_path_factory.mktemp("without") / "run"
    write_images(folder.parent / "data")
    write_recipe(folder.parent / "tiny.toml", TINY.replace(SHAPES_DATA, VOC_DATA).replace('"."', '"data"'))
    make_all(opened(folder, feature_store="off"))
    assert not (folder / FOLDER).exists()
    before = hashes(folder)
    yield folder
    assert hashes(folder) == before


def copy_without(artifacts, run, folder):
    shutil.copy(run.parent / "tiny.toml", folder)
    shutil.copytree(run.parent / "data", folder / "data")
    copy = shutil.copytree(run, folder / "run", copy_function=link_or_copy)
    for artifact in artifacts:
        for path in copy.glob(f"{artifact}.*"):
            path.unlink()
    return copy


@pytest.fixture
def folder(without, tmp_path):
    """A copy of that run up to M2."""
    return copy_without(FROZEN, without, tmp_path)


@pytest.fixture
def beginning(without, tmp_path):
    """A copy of that run that holds M0 alone."""
    return copy_without(LEARNING + FROZEN, without, tmp_path)


def opened(folder, *sets, **runtime):
    return open_tiny(folder, *sets, data_root=folder.parent / "data", **runtime)


def stores(folder):
    return sorted(path.name for path in (folder / FOLDER).glob("*"))


def facts(folder, artifact):
    return opened(folder).record(artifact).metrics


@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_bytes_with_and_without(without, folder, workers):
    assert make_all(opened(folder, feature_store="on", workers=workers)) == list(FROZEN)
    assert hashes(folder) == hashes(without)
    assert len(stores(folder)) == 1
    assert facts(folder, "M3")["feature_store"].startswith(f"built: {MAPS} maps")
    assert facts(folder, "M3")["store_maps_found"] == 0
    assert facts(folder, "P2")["feature_store"] == facts(folder, "M4")["feature_store"] == "read"
    assert facts(without, "M4")["feature_store"] == "off: not wanted (--feature-store off)"


def test_stored_maps_are_what_decides(without, folder):
    """With other values in the store, M3 and all that follows is other: so the store is what is read."""
    make_m3(folder, feature_store="on")
    path = folder / FOLDER / stores(folder)[0]
    rewritten(path, 1.0)
    make_all(opened(folder, feature_store="on"))
    assert hashes(folder, "M3") == hashes(without, "M3")
    assert all(hashes(folder, name) != hashes(without, name) for name in ("P2", "M4"))


def make_m3(folder, *sets, **runtime):
    run = opened(folder, *sets, **runtime)
    run.bring_up_to_date([find_step(run.recipe.steps, "M3")])
    return run


def test_bfloat16_is_stored_as_it_is_computed(folder):
    half = "train_rpn_frozen_conv.precision=bfloat16"
    make_m3(folder, half, feature_store="on")
    stored = hashes(folder, "M3")
    (folder / "M3.json").unlink()
    make_m3(folder, half, feature_store="off")
    assert hashes(folder, "M3") == stored
    with FeatureMapFile(folder / FOLDER / stores(folder)[0]) as file:
        assert file.precision == "bfloat16"


def test_maps_are_those_of_m2s_conv_layers_image_by_image(folder):
    run = make_m3(folder, feature_store="on")
    config = run.recipe.config(find_step(run.recipe.steps, "M3"))
    inference = Inference([(folder / "M2.safetensors", ("conv",))], config, run.runtime)
    with FeatureMapFile(folder / FOLDER / stores(folder)[0]) as file:
        assert len(file.keys) == MAPS
        for key in file.keys:
            sample = read_sample(inference.dataset, key.image_id, config.network, flipped=key.mirrored)
            expected = image_maps(inference.networks[0].conv, make_batch([sample], torch.device("cpu")))[0]
            assert torch.equal(file.get(key), expected)


def test_auto_says_why_not(folder):
    reports = Reports()
    make_all(opened(folder, report=reports))
    assert "feature store off: 8 visits see only part of 10 images, caching would not pay" in reports.texts()
    assert not stores(folder)


def test_auto_builds_where_images_are_seen_again(folder):
    make_all(opened(folder, "train_rpn_frozen_conv.iterations=6"))
    assert facts(folder, "M3")["feature_store"].startswith("built")
    assert facts(folder, "M4")["feature_store"] == "read"  # though it alone would not have built one


def test_auto_goes_without_where_the_disk_is_full(folder, without, monkeypatch):
    """Found out before, or only when it happens."""
    free = [2**40, 0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**41, 0, free.pop(0)))
    make_m3(folder, "train_rpn_frozen_conv.iterations=6")
    assert facts(folder, "M3")["feature_store"].startswith("off: ")
    assert "free" in facts(folder, "M3")["feature_store"]
    assert not stores(folder)


def test_stores_of_other_conv_layers_are_removed_and_others_stay(folder):
    (folder / FOLDER).mkdir()
    other = "0123456789abcdef-0"
    for name in (f"{other}.safetensors", f"{other}.growing.safetensors", f"08-{other}.h5"):
        (folder / FOLDER / name).write_bytes(b"old")
    reports = Reports()
    make_all(opened(folder, feature_store="on", report=reports))
    removed = "is removed: other conv layers, or an earlier altopt, made it"
    assert len([text for text in reports.texts() if removed in text]) == 3
    first = stores(folder)
    assert len(first) == 1
    make_all(opened(folder, "train_fast_rcnn_frozen_conv.flips=false", feature_store="on"))
    assert stores(folder) == first  # with mirror images it serves those who want none


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"no store"), lambda path: path.unlink()])
def test_a_damaged_or_missing_store_is_built_anew(folder, without, damage):
    make_m3(folder, feature_store="on")
    path = folder / FOLDER / stores(folder)[0]
    before = sha256_file(path)
    damage(path)
    make_all(opened(folder, feature_store="on"))
    assert sha256_file(path) == before
    assert hashes(folder) == hashes(without)


def test_without_a_digest_of_the_data_nothing_is_stored(folder):
    run = opened(folder, feature_store="on")
    step = find_step(run.recipe.steps, "M3")
    result = step.stage(folder / "M2.safetensors", out=folder / "M3.safetensors", config=run.recipe.config(step),
                        runtime=run.runtime)
    assert result["feature_store"] == "off: the stage was not told the digest of its data"


def test_interrupted_while_building_it_goes_on(folder, without):
    reports = Reports(at=lambda event: isinstance(event, ImagesDone) and event.what == "maps"
                      and event.done == 4, act=lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        make_all(opened(folder, feature_store="on", report=reports, workers=2))
    assert [name.endswith(".growing.safetensors") for name in stores(folder)] == [True]
    make_all(opened(folder, feature_store="on"))
    assert facts(folder, "M3")["store_maps_found"] >= 3
    assert hashes(folder) == hashes(without)


def test_killed_while_building_and_while_training_gives_the_same_bytes(folder, without):
    """kill -9, then the same again: first in the middle of the store, then of M3, then of M4."""
    for artifact, event, count in (("M3", "images", 5), ("M3", "progress", 3), ("M4", "progress", 2)):
        process = PROCESSES.Process(target=work_until_killed, args=(folder, artifact, event, count, "on"))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL
    assert make_all(opened(folder, feature_store="on")) == ["M4", "M5"]
    assert hashes(folder) == hashes(without)
    assert len(stores(folder)) == 1


def test_the_digest_is_of_all_that_maps_depend_on(folder):
    run = opened(folder)
    config = run.recipe.config(find_step(run.recipe.steps, "M3"))
    inference = Inference([(folder / "M2.safetensors", ("conv",))], config, run.runtime)
    conv = inference.networks[0].conv

    def path(flips=True, precision="float32", data="d", pixels=TORCHVISION_PIXELS, **network):
        frame = type(config.network)(**{**vars(config.network), **network})
        run.runtime.data_digest = data
        store = FeatureStore(folder / "M3.safetensors", conv, pixels, frame, inference.dataset, run.runtime,
                             precision=precision, device=inference.device)
        return store._path(flips)

    same, *others = [path(), path(flips=False), path(precision="bfloat16"), path(data="e"), path(short_side=81),
                     path(max_side=99), path(pixels=Pixels("BGR"))]
    assert path(anchor_scales=(1.0,)) == same  # maps know no anchors
    with torch.no_grad():
        conv.get_parameter("conv5.0.bias")[0] += 1
    assert len({same, *others, path()}) == 8
    assert growing_path(same) != same


def values_of(path):
    with FeatureMapFile(path) as file:
        return {key: file.get(key).clone() for key in file.keys}


def rewritten(path, value):
    """The same store with one value in the place of all maps."""
    with FeatureMapFile(path) as file:
        shapes = {key: (channels, h, w) for key in file.keys for channels, h, w in [file.get(key).shape]}
        description = {name: file.description[name] for name in ("conv", "dataset", "settings")}
    with FeatureMapWriter(path, description, shapes, "float32") as writer:
        for key, shape in shapes.items():
            writer.write(key, torch.full(shape, value))


@pytest.mark.parametrize(("artifact", "workers"), [("P2", 0), ("M4", 3)])
def test_damaged_maps_are_computed_again_to_the_same_bytes(folder, without, artifact, workers):
    run = opened(folder, feature_store="on")
    run.bring_up_to_date(run.recipe.steps[: run.recipe.steps.index(find_step(run.recipe.steps, artifact))])
    path = folder / FOLDER / stores(folder)[0]
    before, content = sha256_file(path), bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in range(begin, len(content), 128 * 4):  # every map is damaged
        content[place] ^= 1
    path.write_bytes(content)
    reports = Reports()
    run = opened(folder, feature_store="on", report=reports, workers=workers)
    run.bring_up_to_date([find_step(run.recipe.steps, artifact)])
    assert hashes(folder, artifact) == hashes(without, artifact)
    assert len([text for text in reports.texts() if "is damaged: damaged maps are computed at each visit" in text]) == 1
    assert not stores(folder)  # so that the next stage builds it anew
    (folder / "M4.json").unlink(missing_ok=True)
    make_all(opened(folder, feature_store="on"))
    assert hashes(folder) == hashes(without)
    assert sha256_file(folder / FOLDER / stores(folder)[0]) == before


def test_a_stage_whose_conv_layers_learn_stores_nothing_and_says_nothing(beginning):
    reports = Reports()
    run = opened(beginning, feature_store="on", report=reports)
    run.bring_up_to_date(run.recipe.steps[:4])
    assert not stores(beginning)
    assert not any("feature store" in text for text in reports.texts())
    assert not any("feature_store" in facts(beginning, artifact) for artifact in LEARNING)


def test_frozen_layers_that_see_several_scales_store_nothing(folder):
    run = opened(folder, "train_fast_rcnn.freeze=['conv*']", "train_fast_rcnn.scales=[64,80]", feature_store="on")
    run.make(find_step(run.recipe.steps, "M2"))
    assert stores(folder) == []
    assert "feature_store" not in facts(folder, "M2")


@pytest.mark.parametrize("stage", [train_approximate_joint, train_exact_joint])
def test_joint_training_with_frozen_layers_too(beginning, stage):
    step, results = Step("J1", stage, "M0"), []
    for wish in ("off", "on"):
        run = opened(beginning, feature_store=wish)
        run.runtime.data_digest = "d"
        config = replace(run.recipe.config(step), freeze=("conv*",))
        found = stage(beginning / "M0.safetensors", out=beginning / f"{wish}.safetensors", config=config,
                      runtime=run.runtime)
        results.append(sha256_file(beginning / f"{wish}.safetensors"))
        assert found["feature_store"].startswith("built" if wish == "on" else "off")
    assert results[0] == results[1]
