import numpy as np
import pytest

from altopt.errors import ArtifactError
from cache.files import sha256_file
from cache.region_features import ImageRegions, RegionCount, RegionFeatureFile, RegionFeatureWriter, RegionSizes

COUNTS = {"a": RegionCount(4, 2), "none": RegionCount(0, 0), "c": RegionCount(3, 1)}
OBJECTS = {"a": 2, "none": 0, "c": 0}
ATTRIBUTES = {"method": "rcnn", "model": "m", "classes": ["cat", "dog"], "network": {"name": "small"}, "settings": {}}


def regions_of(id, stored="float32"):
    random = np.random.default_rng(len(id) + ord(id[0]))
    regions, pooled = COUNTS[id]
    labels = np.array([1] * OBJECTS[id] + [-1] * (regions - OBJECTS[id]), np.int32)
    return ImageRegions(
        random.random((regions, 4), np.float32), labels, random.random((regions, 2), np.float32),
        random.random((regions, 5)).astype(stored), random.random((pooled, 6)).astype(stored),
        np.arange(pooled, dtype=np.int32), random.random((pooled, 4), np.float32),
    )


def write(path, ids=tuple(COUNTS), stored="float32"):
    with RegionFeatureWriter(path, ATTRIBUTES, COUNTS, RegionSizes(2, 5, 6, stored)) as writer:
        for id in ids:
            if not writer.done(id):
                writer.write(id, regions_of(id, stored))


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_round_trip(tmp_path, stored):
    write(tmp_path / "F2.safetensors", stored=stored)
    with RegionFeatureFile(tmp_path / "F2.safetensors") as file:
        assert (file.image_ids, file.classes, file.description["method"]) == (tuple(COUNTS), ["cat", "dog"], "rcnn")
        assert (len(file), file.width("features"), file.width("pooled")) == (3, 5, 6)
        for image, id in enumerate(COUNTS):
            expected = regions_of(id, stored)
            np.testing.assert_array_equal(file.rows("features", image), expected.features.astype(np.float32))
            for name in ("boxes", "overlaps"):
                np.testing.assert_array_equal(file.rows(name, image), getattr(expected, name))
            np.testing.assert_array_equal(file.labels(image), expected.labels)
            labels, rows = file.objects(image)
            assert labels.tolist() == [1] * OBJECTS[id]
            np.testing.assert_array_equal(rows, expected.features[: OBJECTS[id]].astype(np.float32))
        assert file.pooled_labels().tolist() == [0, 1, 0]
        pooled = np.concatenate([regions_of(id, stored).pooled for id in COUNTS]).astype(np.float32)
        targets = np.concatenate([regions_of(id, stored).pooled_targets for id in COUNTS])
        blocks = list(file.pooled(np.array([2, 0, 1]), block=2))
        assert [len(block) for block in blocks] == [2, 1]
        np.testing.assert_array_equal(np.concatenate(blocks), pooled[[2, 0, 1]])
        np.testing.assert_array_equal(file.pooled_targets([2, 0]), targets[[2, 0]])
        assert file.pooled_targets([]).shape == (0, 4)


def test_an_interrupted_writer_is_continued(tmp_path):
    write(tmp_path / "whole.safetensors")
    with pytest.raises(ValueError, match="was never written"):
        write(tmp_path / "F2.safetensors", ["c"])
    write(tmp_path / "F2.safetensors")
    assert sha256_file(tmp_path / "F2.safetensors") == sha256_file(tmp_path / "whole.safetensors")


def test_other_counts_than_were_said_are_refused(tmp_path):
    writer = RegionFeatureWriter(tmp_path / "F2.safetensors", {}, COUNTS, RegionSizes(2, 5, 6, "float32"))
    with pytest.raises(ValueError, match=r"c: boxes is float32 \(4, 4\), not float32 \(3, 4\)"), writer:
        writer.write("c", regions_of("a"))


def test_a_proposal_file_is_not_mistaken_for_features(tmp_path):
    from cache.proposals import ProposalWriter

    with ProposalWriter(tmp_path / "P1.h5", {}) as writer:
        writer.append("a", np.zeros((1, 4)), np.zeros(1))
    with pytest.raises(ArtifactError, match=r"P1.h5 cannot be used"):
        RegionFeatureFile(tmp_path / "P1.h5")
