"""SPP-net and slow R-CNN from M0 to detections, on five images of 96 x 80."""

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from region_runs import DATA, NETWORK, STAGES, TRAINING, Stopping, hashes, make, make_all, prepare

from altopt.batches.samples import make_batch, read_sample, stored_sample
from altopt.batches.sampling import RoISampling, RoIThresholds
from altopt.datasets.shapes import ShapesDataset
from altopt.errors import ArtifactError
from altopt.evaluation.detections import read_detections
from altopt.extents import original_frame
from altopt.machine.randomness import generator, seed_of
from altopt.models.region_classifier import PyramidTraining, RegionClassifier
from altopt.models.trunk import image_maps
from altopt.ops import boxes as bx
from altopt.ops.pyramid import pyramid_pool
from altopt.ops.warped_crops import warp
from altopt.training.ridge import fit_box_ridge
from altopt.training.svm import MinedSVM, mine
from cache.checkpoints import load_checkpoint, read_description
from cache.features import FeatureMapFile, MapKey
from cache.proposals import ProposalFile
from cache.region_features import RegionFeatureFile
from stages.shared.events import TrainingProgress
from stages.shared.regions import boxes_of
from stages.shared.step import Runtime, file_name
from stages.steps.spp_net import TrainFCLayers, train_fc_layers
from stages.steps.svms import TrainSVMs

CPU = torch.device("cpu")
TRAIN, TEST = (ShapesDataset((split,), width=96, height=80) for split in ("train:5", "test:3"))
# The event at which each stage is stopped; SVMs and regressors begin again.
STOPS = {"F1": ("images", 3), "F2": ("images", 2), "M1": ("progress", 2), "S1": ("images", 2),
         "R1": ("images", 1), "D1": ("images", 1)}
EACH_SCHEME = pytest.mark.parametrize("scheme", STAGES)
WITH_REGRESSORS = pytest.mark.parametrize("scheme", ["spp_net", "rcnn"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = {scheme: tmp_path_factory.mktemp("made") / scheme for scheme in STAGES}
    facts = {scheme: make_all(folder, scheme) for scheme, folder in folders.items()}
    before = {scheme: hashes(folder, scheme) for scheme, folder in folders.items()}
    yield folders, facts
    assert {scheme: hashes(folder, scheme) for scheme, folder in folders.items()} == before


@pytest.fixture
def copied(made, tmp_path):
    return {scheme: shutil.copytree(folder, tmp_path / scheme) for scheme, folder in made[0].items()}


def network_of(folder, levels=()):
    classifier = RegionClassifier(NETWORK, len(TRAIN.classes), levels)
    assert classifier.fill(load_checkpoint(folder / "M1.safetensors")[0], generator("unused")) == []
    return classifier.eval()


@EACH_SCHEME
def test_stopped_in_every_stage_and_continued_gives_the_same_bytes(made, tmp_path, scheme):
    prepare(tmp_path)
    for artifact, *_ in STAGES[scheme]:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, artifact, scheme, report=Stopping(*STOPS[artifact]), workers=2)
        assert not (tmp_path / file_name(artifact)).exists()
        again = Stopping("never", 0)
        facts = make(tmp_path, artifact, scheme, report=again)
        if artifact == "M1":
            assert [event.iteration for event in again.seen if isinstance(event, TrainingProgress)] == [3, 4]
        assert facts.get("maps_found", facts.get("images_found", 2)) >= 2
    assert hashes(tmp_path, scheme) == hashes(made[0][scheme], scheme)
    assert not list(tmp_path.glob("*.growing.*"))
    assert not list(tmp_path.glob("*.snapshot.*"))


def test_another_seed_gives_other_bytes(copied):
    """Otherwise the test before this one says nothing."""
    folder = copied["spp_net"]
    config = TrainFCLayers(network=NETWORK, data=DATA, **TRAINING, seed=4)
    before = hashes(folder, "spp_net")["M1"]
    train_fc_layers(folder / "M0.safetensors", folder / "F1.safetensors", folder / "P0.h5",
                    out=folder / "M1.safetensors", config=config, runtime=Runtime(device="cpu"))
    assert hashes(folder, "spp_net")["M1"] != before


def test_spp_net_trains_fc_layers_of_its_own_and_leaves_conv_alone(made):
    before, _ = load_checkpoint(made[0]["spp_net"] / "M0.safetensors")
    after, description = load_checkpoint(made[0]["spp_net"] / "M1.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["fc.fc6.weight"].shape == (256, 128 * 50)
    assert (description["method"], description["levels"]) == ("spp_net", [6, 3, 2, 1])


def test_rcnn_trains_all_layers(made):
    before, _ = load_checkpoint(made[0]["rcnn"] / "M0.safetensors")
    after, description = load_checkpoint(made[0]["rcnn"] / "M1.safetensors")
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["fc.fc6.weight"].shape == (256, 128 * 36)
    assert (description["method"], description["crop_side"]) == ("rcnn", 64)


@torch.inference_mode()
def test_maps_are_what_the_conv_layers_make_of_each_image(made):
    folder = made[0]["spp_net"]
    conv = network_of(folder, (6, 3, 2, 1)).conv.to(memory_format=torch.channels_last)
    frames = NETWORK.at_scales((64, 96), 200)
    with FeatureMapFile(folder / "F1.safetensors") as file:
        assert len(file.keys) == 5 * 2 * 2
        for key in file.keys:
            sample = read_sample(TRAIN, key.image_id, frames[key.scale], flipped=key.mirrored)
            assert torch.equal(file.get(key), conv(make_batch([sample], CPU).images)[0])


@torch.inference_mode()
def test_spp_net_features_are_pyramids_of_the_scale_that_suits_the_region(made):
    folder = made[0]["spp_net"]
    network = network_of(folder, (6, 3, 2, 1))
    scales = []
    with RegionFeatureFile(folder / "F2.safetensors") as file, FeatureMapFile(folder / "F1.safetensors") as maps:
        for image, id in enumerate(TRAIN.ids):
            for box, hidden in zip(file.rows("boxes", image), file.rows("features", image), strict=True):
                area = (box[2] - box[0]) * (box[3] - box[1])
                scale = min((0, 1), key=lambda s: abs(area * (0.8, 1.2)[s] ** 2 - 1600))
                scaled = torch.tensor(box)[None] * (0.8, 1.2)[scale]
                features = maps.get(MapKey(id, False, scale))[None]
                expected = network.fc(pyramid_pool(features, [scaled], (6, 3, 2, 1), 1 / 16))[0]
                torch.testing.assert_close(torch.tensor(hidden), expected, atol=1e-4, rtol=1e-4)
                scales.append(scale)
    assert set(scales) == {0, 1}


@torch.inference_mode()
def test_rcnn_features_are_those_of_each_warped_region_by_itself(made):
    folder = made[0]["rcnn"]
    network = network_of(folder)
    id = TRAIN.ids[1]
    sample = read_sample(TRAIN, id, original_frame(NETWORK, TRAIN.size(id)))
    assert sample.scale == 1
    image = make_batch([sample], CPU).images[0]
    with RegionFeatureFile(folder / "F1.safetensors") as file:
        rows = zip(file.rows("boxes", 1), file.rows("features", 1), strict=True)
        for box, hidden in list(rows)[::3]:
            expected = network.fc(network.pool_crops(warp(image, torch.tensor(box)[None], 64)))[0]
            torch.testing.assert_close(torch.tensor(hidden), expected, atol=5e-3, rtol=5e-3)  # stored as float16


@pytest.mark.parametrize(("scheme", "artifact", "overlap"), [("spp_net", "F2", 0.5), ("rcnn", "F1", 0.6)])
def test_regions_are_objects_and_proposals_with_their_overlaps(made, scheme, artifact, overlap):
    folder = made[0][scheme]
    kept = []
    with RegionFeatureFile(folder / f"{artifact}.safetensors") as file, ProposalFile(folder / "P0.h5") as proposals:
        assert file.image_ids == TRAIN.ids
        for image, id in enumerate(TRAIN.ids):
            objects = TRAIN.objects(id)
            boxes, overlaps = file.rows("boxes", image), file.rows("overlaps", image)
            np.testing.assert_array_equal(boxes, np.concatenate([objects.boxes, proposals.get(id)[0]]))
            assert file.objects(image)[0].tolist() == objects.labels.tolist()
            for r, box in enumerate(boxes):
                of_object = [float(bx.iou(torch.tensor(box)[None], torch.tensor(each)[None])) for each in objects.boxes]
                for label in range(len(TRAIN.classes)):
                    own = [iou for iou, other in zip(of_object, objects.labels, strict=True) if other == label]
                    assert overlaps[r, label] == pytest.approx(max(own, default=0), abs=1e-6)
                if r >= len(objects) and max(of_object) > overlap:
                    best = int(np.argmax(of_object))
                    deltas = bx.encode(torch.tensor(objects.boxes[best])[None], torch.tensor(box)[None])[0]
                    kept.append((objects.labels[best], *deltas.tolist()))
        assert file.pooled_labels().tolist() == [label for label, *_ in kept]
        targets = file.pooled_targets(range(len(kept)))
        np.testing.assert_allclose(targets, [deltas for _, *deltas in kept], atol=1e-6)


def test_a_image_without_objects_has_only_negatives():
    class Empty(ShapesDataset):
        def objects(self, image_id):
            objects = super().objects(image_id)
            objects.difficult[:] = True
            return objects

    dataset = Empty(("train:1",), width=96, height=80)
    proposals = np.array([[0, 0, 10, 10], [5, 5, 30, 40]], np.float32)
    found = boxes_of(dataset, dataset.ids[0], proposals, 0.5)
    np.testing.assert_array_equal(found.boxes.numpy(), proposals)
    assert found.overlaps.shape == (2, len(dataset.classes))
    assert found.overlaps.max() == 0
    assert (found.labels.tolist(), len(found.kept)) == ([-1, -1], 0)


@WITH_REGRESSORS
def test_detections_are_scored_by_svms_and_refined_by_regressors(made, scheme):
    """One image again, by hand; suppression leaves what no better box of its class overlaps."""
    folder, facts = made[0][scheme], made[1][scheme]["D1"]
    assert {"seconds_per_image", "recall_at_0.5", "average_recall"} == set(facts)
    found = read_detections(folder / file_name("D1"), TEST.ids, TEST.category_ids)
    assert sum(map(len, found.values())) > 0
    for id in TEST.ids:
        boxes = torch.from_numpy(found[id].boxes)
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([96, 80, 96, 80]) + 1e-3).all()
        for label in set(found[id].labels.tolist()):
            own = boxes[torch.from_numpy(found[id].labels) == label]
            assert (bx.iou(own, own).fill_diagonal_(0) <= 0.3 + 1e-4).all()
    best = by_hand(folder, scheme, TEST.ids[0])
    index = int(np.argmax(found[TEST.ids[0]].scores))
    assert found[TEST.ids[0]].scores[index] == pytest.approx(best[1], abs=1e-3)
    np.testing.assert_allclose(found[TEST.ids[0]].boxes[index], best[0], atol=0.05)


@torch.inference_mode()
def by_hand(folder, scheme, id):
    """The best box of an image and its score, from all proposals one by one."""
    svms, regressors = (load_checkpoint(folder / file_name(name))[0] for name in ("S1", "R1"))
    network = network_of(folder, read_description(folder / "M1.safetensors").get("levels", ()))
    best = (np.zeros(4), -np.inf)
    for row in ProposalFile(folder / "T0.h5").get(id)[0]:
        box = torch.from_numpy(row)[None]
        pooled = pooled_by_hand(network, scheme, id, box)
        scores = network.fc(pooled)[0] @ svms["weights"].T + svms["biases"]
        label = int(scores.argmax())
        if scores[label] > best[1]:
            deltas = pooled @ regressors["weights"][label].T + regressors["biases"][label]
            best = (bx.clip(bx.decode(deltas, box), (96, 80))[0].numpy(), float(scores[label]))
    return best


def pooled_by_hand(network, scheme, id, box):
    if scheme == "rcnn":
        image = make_batch([read_sample(TEST, id, original_frame(NETWORK, (96, 80)))], CPU).images[0]
        return network.pool_crops(warp(image, box, 64))
    area = float(bx.area(box))
    scale = min((0, 1), key=lambda s: abs(area * (0.8, 1.2)[s] ** 2 - 1600))
    sample = read_sample(TEST, id, NETWORK.at_scales((64, 96), 200)[scale])
    return pyramid_pool(network.conv(make_batch([sample], CPU).images), [box * sample.scale], (6, 3, 2, 1), 1 / 16)


def test_training_on_stored_maps_is_training_on_fresh_ones(made):
    """Also where maps of several sizes share a batch: the padding of the smaller ones is not seen."""
    folder = made[0]["spp_net"]
    network = network_of(folder, (6, 3, 2, 1))
    frames = NETWORK.at_scales((64, 96), 200)
    module = PyramidTraining(network, (6, 3, 2, 1), RoISampling(RoIThresholds(0.5, 0.5, 0.1), 16, 0.25), ("test",))
    with FeatureMapFile(folder / "F1.safetensors") as maps, ProposalFile(folder / "P0.h5") as proposals:
        stored, fresh = [], []
        for scale, id in enumerate(TRAIN.ids[:2]):
            given: dict[str, Any] = {"flipped": True, "proposals": proposals.get(id)[0]}
            stored.append(stored_sample(TRAIN, id, frames[scale], maps.get(MapKey(id, True, scale)), **given))
            fresh.append(read_sample(TRAIN, id, frames[scale], **given))
    for one, other in zip(stored, fresh, strict=True):
        assert (one.id, one.flipped, one.scale, one.size) == (other.id, other.flipped, other.scale, other.size)
        assert torch.equal(one.proposals, other.proposals)
        assert torch.equal(one.gt_boxes, other.gt_boxes)
        assert one.pixels.untyped_storage().nbytes() == 1
    together = module(make_batch([module.prepare(sample, 0) for sample in stored], CPU))["cls"]
    alone = []
    for sample in fresh:
        batch = make_batch([module.prepare(sample, 0)], CPU)
        alone.append(module(replace(batch, maps=image_maps(network.conv, batch)))["cls"])
    total, count = (sum(getattr(loss, name) for loss in alone) for name in ("total", "count"))
    torch.testing.assert_close(together.total / together.count, total / count)


def test_maps_of_other_conv_layers_are_refused(copied):
    folder = copied["spp_net"]
    shutil.copy(copied["rcnn"] / "M1.safetensors", folder / "M0.safetensors")
    with pytest.raises(ArtifactError, match=r"F1.safetensors was made by other conv layers"):
        make(folder, "M1", "spp_net")


@pytest.mark.parametrize("artifact", ["S1", "R1"])
def test_svms_and_regressors_of_another_network_are_refused(copied, artifact):
    shutil.copy(copied["spp_net"] / file_name(artifact), copied["rcnn"] / file_name(artifact))
    with pytest.raises(ArtifactError, match=f"{artifact}.safetensors was trained on the features of another network"):
        make(copied["rcnn"], "D1", "rcnn")


def test_a_network_of_the_other_scheme_is_refused(copied):
    shutil.copy(copied["spp_net"] / "M1.safetensors", copied["rcnn"] / "M1.safetensors")
    with pytest.raises(ArtifactError, match=r"M1.safetensors was not fine-tuned for rcnn"):
        make(copied["rcnn"], "F1", "rcnn")


def test_bfloat16_is_stored_as_computed_and_changes_little(made, copied):
    """The fine-tuned network of the float32 run serves both; only what is computed with it differs."""
    folder, half = copied["spp_net"], {"precision": "bfloat16"}
    for artifact in ("F1", "F2", "S1", "R1", "D1"):
        make(folder, artifact, "spp_net", changes=half if artifact in ("F1", "F2", "D1") else {})
    float32 = made[0]["spp_net"]
    assert (folder / "F1.safetensors").stat().st_size < 0.55 * (float32 / "F1.safetensors").stat().st_size
    with RegionFeatureFile(folder / "F2.safetensors") as one, RegionFeatureFile(float32 / "F2.safetensors") as other:
        difference = np.abs(one.rows("features", 0) - other.rows("features", 0)).max()
        assert 0 < difference < 0.05 * np.abs(other.rows("features", 0)).max()
    assert sum(map(len, read_detections(folder / file_name("D1"), TEST.ids, TEST.category_ids).values())) > 0


@pytest.mark.parametrize(("scheme", "artifact"), [("spp_net", "F2"), ("rcnn", "F1")])
def test_linear_layers_take_features_as_they_are(made, scheme, artifact):
    """They are trained on features of another norm, and the factor is part of their weights."""
    folder, facts = made[0][scheme], made[1][scheme]
    svms, regressors = (load_checkpoint(folder / file_name(name))[0] for name in ("S1", "R1"))
    with RegionFeatureFile(folder / f"{artifact}.safetensors") as file:
        scale = facts["S1"]["feature_scale"]
        found = [file.objects(image) for image in range(len(file))]
        label = int(found[0][0][0])
        svm = MinedSVM(np.concatenate([rows[labels == label] for labels, rows in found]) * scale, TrainSVMs(),
                       seed_of(3, "svm", TRAIN.classes[label]) % 2**31)
        for image in range(len(file)):
            mine([svm], file.rows("features", image) * scale, file.rows("overlaps", image)[:, label : label + 1])
        svm.train()
        scores = torch.tensor(file.rows("features", 0)) @ svms["weights"][label] + svms["biases"][label]
        np.testing.assert_allclose(scores, svm.scores(file.rows("features", 0) * scale), atol=1e-3)

        scale = facts["R1"]["feature_scale"]
        own = np.flatnonzero(file.pooled_labels() == label)
        rows = torch.from_numpy(np.concatenate(list(file.pooled(own))))
        targets = torch.from_numpy(file.pooled_targets(own))
        weights, biases = fit_box_ridge(lambda: [rows * scale], targets, facts["R1"]["ridge"], 0.001)
        deltas = rows @ regressors["weights"][label].T + regressors["biases"][label]
        torch.testing.assert_close(deltas, rows * scale @ weights.T + biases, atol=1e-4, rtol=1e-3)


@WITH_REGRESSORS
def test_facts_for_the_record(made, scheme):
    folder, facts = made[0][scheme], made[1][scheme]
    features = facts["F2" if scheme == "spp_net" else "F1"]
    name = "F2" if scheme == "spp_net" else "F1"
    assert features["bytes"] == (folder / f"{name}.safetensors").stat().st_size
    assert features["regions"] == sum(len(each.get(id)[0]) + len(TRAIN.objects(id)) for each in
                                      [ProposalFile(folder / "P0.h5")] for id in TRAIN.ids)
    assert facts["S1"]["positives"] == sum(len(TRAIN.objects(id)) for id in TRAIN.ids)
    assert facts["S1"]["trainings"] >= len(TRAIN.classes)
    assert facts["R1"]["ridge"] == {"spp_net": 4000, "rcnn": 1000}[scheme]
    assert facts["R1"]["regions"] == features["pooled_regions"] > 0
