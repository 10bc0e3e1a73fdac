import threading
from contextlib import suppress

import numpy as np
import pytest
import torch

from altopt.errors import ArtifactError
from altopt.machine.randomness import generator
from cache.features import FeatureMapFile, FeatureMapWriter, MapKey
from cache.files import sha256_file

ATTRIBUTES = {"conv": "c" * 64, "dataset": "d" * 64, "settings": {"scales": [600], "max_side": 1000}}
KEYS = [MapKey(id, mirrored, scale) for id in ("000005", "b/ä.jpg") for mirrored in (False, True) for scale in (0, 1)]
SHAPES = {key: (3, 2 + scale, 4 + len(KEYS[k].image_id)) for k, key in enumerate(KEYS) for scale in [key.scale]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "F1.safetensors"


def map_of(key, precision="float32"):
    return torch.randn(SHAPES[key], generator=generator(*key)).to(getattr(torch, precision))


def write(path, keys=KEYS, precision="float32"):
    with FeatureMapWriter(path, ATTRIBUTES, SHAPES, precision) as writer:
        for key in keys:
            if not writer.done(key):
                writer.write(key, map_of(key, precision))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_maps_come_back_to_the_last_bit(path, precision):
    write(path, precision=precision)
    with FeatureMapFile(path) as file:
        assert list(file.keys) == KEYS
        assert str(KEYS[-1]) == "b/ä.jpg/mirrored/1"
        assert file.settings == ATTRIBUTES["settings"]
        assert (file.description["conv"], file.precision) == ("c" * 64, precision)
        for key in reversed(KEYS):
            assert torch.equal(file.get(key), map_of(key, precision))
            assert file.get(key).dtype == getattr(torch, precision)
            assert file.get(key)[None].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_takes_half_the_room(path, tmp_path):
    write(path, precision="bfloat16")
    write(tmp_path / "wide.safetensors")
    values = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert (tmp_path / "wide.safetensors").stat().st_size - path.stat().st_size == pytest.approx(2 * values, abs=64)


def test_memory_format_does_not_matter(path, tmp_path):
    write(path)
    with FeatureMapWriter(tmp_path / "other.safetensors", ATTRIBUTES, SHAPES, "float32") as writer:
        for key in KEYS:
            writer.write(key, map_of(key)[None].to(memory_format=torch.channels_last)[0])
    assert sha256_file(path) == sha256_file(tmp_path / "other.safetensors")


def test_an_interrupted_writer_is_continued(path, tmp_path):
    write(tmp_path / "whole.safetensors")
    with suppress(KeyboardInterrupt), FeatureMapWriter(path, ATTRIBUTES, SHAPES, "float32") as writer:
        writer.write(KEYS[3], map_of(KEYS[3]))
        raise KeyboardInterrupt
    with FeatureMapWriter(path, ATTRIBUTES, SHAPES, "float32") as writer:
        assert [key for key in KEYS if writer.done(key)] == [KEYS[3]]
        for key in KEYS[:3] + KEYS[4:]:
            writer.write(key, map_of(key))
    assert sha256_file(path) == sha256_file(tmp_path / "whole.safetensors")


def test_threads_read_one_file(path):
    write(path)
    wrong: list[object] = []
    with FeatureMapFile(path) as file:
        def work():
            wrong.extend(key for _ in range(20) for key in KEYS if not torch.equal(file.get(key), map_of(key)))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_other_shapes_and_precisions_are_refused(path):
    with pytest.raises(ValueError, match="not float32"), FeatureMapWriter(path, {}, SHAPES, "float32") as writer:
        writer.write(KEYS[0], map_of(KEYS[0], "bfloat16"))
    with pytest.raises(ValueError, match="not float32"), FeatureMapWriter(path, {}, SHAPES, "float32") as writer:
        writer.write(KEYS[0], map_of(KEYS[1])[:2])


def test_unknown_and_damaged_maps(path):
    write(path)
    with FeatureMapFile(path) as file:
        with pytest.raises(ArtifactError, match=r"no map of 000005/upright/7: make it for this data set"):
            file.get(MapKey("000005", False, 7))
        place = file.units[str(KEYS[1])]["map"].ctypes.data - file.units[str(KEYS[0])]["map"].ctypes.data
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as content:
        content.seek(begin + place)
        content.write(b"damage")
    with FeatureMapFile(path) as file:
        with pytest.raises(ArtifactError, match=r"its map of 000005/upright/1 is damaged: make it again"):
            file.get(KEYS[1])
        assert torch.equal(file.get(KEYS[2]), map_of(KEYS[2]))


def test_a_map_is_not_copied(path):
    write(path)
    with FeatureMapFile(path) as file:
        found = file.get(KEYS[3])
        assert found.data_ptr() == file.units[str(KEYS[3])]["map"].ctypes.data
    assert torch.equal(found, map_of(KEYS[3]))  # though the file is closed


def test_no_maps_at_all(path):
    with FeatureMapWriter(path, ATTRIBUTES, {}, "float32"):
        pass
    with FeatureMapFile(path) as file:
        assert not file.keys
