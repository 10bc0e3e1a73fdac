import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from altopt.errors import ArtifactError, ResourceError
from cache.files import sha256_file
from cache.proposals import CHUNK_ROWS, ProposalFile, ProposalWriter

ROOT = Path(__file__).parents[2]
ATTRIBUTES = {"dataset": "d" * 64, "model": "m" * 64, "settings": {"nms": 0.7, "keep": [2000, None]}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "P1.h5"


def proposals(count, seed=0):
    random = np.random.default_rng(seed)
    corner, size = random.uniform(0, 50, (2, count, 2))
    return np.concatenate([corner, corner + size], 1).astype(np.float32), random.random(count).astype(np.float32)


def write(path, counts, attributes=ATTRIBUTES):
    with ProposalWriter(path, attributes) as writer:
        for number, count in enumerate(counts):
            writer.append(f"{number:06}", *proposals(count, number))


def write_plain(path, **changes):
    """Write a file as a user would, with h5py alone; a change of None drops a data set."""
    boxes = np.array([[0, 0, 10, 10], [1, 2, 3, 4], [5, 5, 5, 5]], np.float32)
    content = {"image_ids": ["a", "b"], "offsets": np.array([0, 1, 3]), "boxes": boxes}
    content = {**content, "scores": np.ones(3, np.float32), **changes}
    with h5py.File(path, "w") as file:
        for name, values in content.items():
            if values is not None:
                file[name] = values


# The last two: more than a chunk at once, and exactly one chunk.
@pytest.mark.parametrize("counts", [[], [0], [3], [2, 0, 0, 5, 0], [3000] * 5, [3 * CHUNK_ROWS + 1, 7], [CHUNK_ROWS]])
def test_round_trip(path, counts):
    write(path, counts)
    with ProposalFile(path) as file:
        assert file.attributes == {**ATTRIBUTES}
        assert len(file) == len(counts)
        assert file.image_ids == tuple(f"{number:06}" for number in range(len(counts)))
        for number, count in reversed(list(enumerate(counts))):
            for actual, expected in zip(file.get(f"{number:06}"), proposals(count, number), strict=True):
                assert actual.dtype == np.float32
                np.testing.assert_array_equal(actual, expected)


def test_ids_are_any_text(path):
    ids = ["2007_000001", "train/ä.jpg", "画像", "397133", ""]
    with ProposalWriter(path, {}) as writer:
        for number, image_id in enumerate(ids):
            writer.append(image_id, *proposals(number))
    file = ProposalFile(path)
    assert file.image_ids == tuple(ids)
    assert len(file.get("画像")[1]) == 2
    assert "画像" in file
    assert "x" not in file


def test_arrays_may_be_reused_by_the_caller(path):
    boxes, scores = proposals(3)
    kept = boxes.copy()
    with ProposalWriter(path, {}) as writer:
        writer.append("a", boxes, scores)
        boxes[:] = -1
    np.testing.assert_array_equal(ProposalFile(path).get("a")[0], kept)


def test_same_content_is_the_same_bytes_at_another_time(tmp_path):
    one, two = tmp_path / "1.h5", tmp_path / "2.h5"
    write(one, [3000, 0, 5000, 1])
    time.sleep(1.01 - time.time() % 1)  # HDF5 stamps what it stamps with the second
    write(two, [3000, 0, 5000, 1], dict(reversed(ATTRIBUTES.items())))
    assert sha256_file(one) == sha256_file(two)
    write(two, [3000, 0, 5000, 1], {**ATTRIBUTES, "model": "x" * 64})
    assert sha256_file(one) != sha256_file(two)


def test_rows_go_to_the_disk_as_they_come(path):
    with ProposalWriter(path, {}) as writer:
        for number in range(40):
            writer.append(str(number), *proposals(CHUNK_ROWS // 4))
        assert writer._waiting_rows < CHUNK_ROWS
        partial = path.with_name(".P1.h5.partial")
        assert partial.stat().st_size > 9 * CHUNK_ROWS * 20
        assert not path.exists()
    assert not partial.exists()


def test_error_leaves_no_file(path, names):
    with pytest.raises(KeyboardInterrupt), ProposalWriter(path, {}) as writer:  # noqa: PT012
        writer.append("a", *proposals(CHUNK_ROWS))
        raise KeyboardInterrupt
    assert names(path.parent) == []


@pytest.mark.parametrize(
    ("boxes", "scores"),
    [
        (np.zeros((2, 4)), np.zeros(3)),
        (np.zeros((2, 5)), np.zeros(2)),
        (np.zeros(4), np.zeros(1)),
        (np.zeros((2, 4)), np.zeros((2, 1))),
    ],
)
def test_arrays_that_do_not_belong_together(path, boxes, scores):
    with ProposalWriter(path, {}) as writer, pytest.raises(ValueError, match=r"not \[K, 4\] and \[K\]"):
        writer.append("a", boxes, scores)


def test_image_is_added_once(path):
    with ProposalWriter(path, {}) as writer:
        writer.append("a", *proposals(1))
        with pytest.raises(ValueError, match="a was added before"):
            writer.append("a", *proposals(1))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_full_disk(path, names, file_size_limit, share):
    write(path, [3000] * 10)
    limit = int(path.stat().st_size * share)
    write(path, [1])
    with file_size_limit(limit), pytest.raises(ResourceError, match=r"P1\.h5 cannot be written"):
        write(path, [3000] * 10)
    assert names(path.parent) == ["P1.h5"]
    assert len(ProposalFile(path)) == 1


def test_python_ends_in_order_after_a_full_disk(path):
    code = """
import pathlib, resource, sys
import numpy as np
from altopt.errors import ResourceError
from cache.proposals import ProposalWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ProposalWriter(pathlib.Path(sys.argv[1]), {}) as writer:
        for number in range(10):
            writer.append(str(number), np.zeros((3000, 4)), np.zeros(3000))
except ResourceError as error:
    sys.exit(error.exit_code)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False).returncode == 6


def test_missing_file(path):
    with pytest.raises(ArtifactError, match=r'P1\.h5 is missing: "altopt plan"'):
        ProposalFile(path)


def test_missing_image(path):
    write(path, [1])
    with pytest.raises(ArtifactError, match=r"P1\.h5 cannot be used: it has no entry for image 7: make it for this"):
        ProposalFile(path).get("7")


def test_file_of_other_origin_needs_no_attributes(path):
    write_plain(path)
    file = ProposalFile(path)
    assert file.attributes == {"settings": {}}
    assert file.get("b")[0].tolist() == [[1, 2, 3, 4], [5, 5, 5, 5]]
    file.check({"a": (10, 10), "b": (10, 10)})


def test_gzip_and_shuffle_are_read(path):
    write_plain(path, boxes=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("boxes", data=np.zeros((3, 4), np.float32), compression="gzip", shuffle=True)
    assert ProposalFile(path).get("b")[0].tolist() == [[0, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"boxes": None}, "it has no data set boxes"),
        ({"image_ids": None}, "it has no data set image_ids"),
        ({"boxes": np.zeros((3, 4))}, r"boxes is float64 \[3, 4\], not float32 \[K, 4\]"),
        ({"boxes": np.zeros((3, 4), ">f4")}, r"boxes is >f4 \[3, 4\]"),
        ({"boxes": np.zeros((3, 5), np.float32)}, r"boxes is float32 \[3, 5\], not float32 \[K, 4\]"),
        ({"boxes": np.zeros(12, np.float32)}, r"boxes is float32 \[12\]"),
        ({"boxes": np.zeros((2, 4), np.float32)}, "2 boxes and 3 scores"),
        ({"scores": np.zeros((3, 1), np.float32)}, r"scores is float32 \[3, 1\], not float32 \[K\]"),
        ({"scores": np.float32(1)}, r"scores is float32 \[\]"),
        ({"image_ids": np.array([1, 2])}, r"image_ids is int64 \[2\], not text \[N\]"),
        ({"image_ids": np.array([b"\xff", b"a"])}, "image_ids is not UTF-8"),
        ({"image_ids": ["a", "a"]}, "image_ids names an image twice"),
        ({"offsets": np.array([0, 3])}, "offsets has 2 entries for 2 images, not 3"),
        ({"offsets": np.array([], np.int64)}, "offsets has 0 entries"),
        ({"offsets": np.array([0, 1, 3], np.int32)}, "offsets is int32"),
        ({"offsets": np.array([0, 1, 2])}, "offsets does not rise from 0 to the 3 rows"),
        ({"offsets": np.array([1, 1, 3])}, "offsets does not rise"),
        ({"offsets": np.array([0, 4, 3])}, "offsets does not rise"),
        ({"offsets": np.array([0, -1, 3])}, "offsets does not rise"),
        ({"boxes": h5py.SoftLink("/scores")}, "boxes is a link"),
        ({"boxes": h5py.ExternalLink("other.h5", "/boxes")}, "boxes is a link"),
    ],
)
def test_file_that_is_not_of_the_schema(path, changes, cause):
    write_plain(path, **changes)
    with pytest.raises(ArtifactError, match=rf"P1\.h5 cannot be used: .*{cause}.*: make it again"):
        ProposalFile(path)


def virtual(file):
    layout = h5py.VirtualLayout((3, 4), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "boxes", (3, 4))
    file.create_virtual_dataset("boxes", layout)


def external(file):
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes(bytes(48))
    file.create_dataset("boxes", (3, 4), np.float32, external=[(str(secret), 0, 48)])


def compact(file):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((3, 4))
    h5py.h5d.create(file.id, b"boxes", h5py.h5t.IEEE_F32LE, space, properties)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (virtual, "boxes is neither contiguous nor chunked"),
        (external, "boxes is neither contiguous nor chunked, or lies outside"),
        (compact, "boxes is neither contiguous nor chunked"),
        (lambda file: file.create_group("boxes"), "boxes is a link or a group"),
        (lambda file: file.create_dataset("boxes", (3, 4), "f4", compression="lzf"), "boxes is compressed by other"),
        (lambda file: file.create_dataset("boxes", (3, 4), "f4", fletcher32=True), "boxes is compressed by other"),
        (lambda file: file.create_dataset("boxes", (3, 4), "f4"), "boxes was never written"),
        (lambda file: file.create_dataset("boxes", (1 << 50, 4), "f4", chunks=(4096, 4)), "boxes was never written"),
    ],
)
def test_what_reaches_beyond_plain_data_is_refused(path, make, cause):
    write_plain(path, boxes=None)
    with h5py.File(path, "a") as file:
        make(file)
    with pytest.raises(ArtifactError, match=rf"P1\.h5 cannot be used: {cause}"):
        ProposalFile(path)


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [("format_version", 2, "format version is 2"), ("settings", "{", "settings is not JSON")],
)
def test_attributes_of_another_kind(path, name, value, cause):
    write(path, [1])
    with h5py.File(path, "a") as file:
        file.attrs[name] = value
    with pytest.raises(ArtifactError, match=cause):
        ProposalFile(path)


def test_damaged_file_is_an_artifact_error_or_the_same_schema(path):
    write(path, [3, 0, 40])
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for number in range(60):
        content = bytearray(whole[: random.integers(len(whole))] if number % 3 == 0 else whole)
        for place in random.integers(0, max(1, min(len(content), 4000)), 3):
            content[place : place + 1] = random.bytes(1)
        path.write_bytes(content)
        try:
            with ProposalFile(path) as file:
                file.check({})
                [file.get(image_id) for image_id in file.image_ids]
        except ArtifactError:
            refused += 1
    assert 20 < refused < 60


@pytest.mark.parametrize(
    ("box", "score", "cause"),
    [
        ((0, 0, np.nan, 1), 1, "is not finite"),
        ((0, 0, np.inf, 1), 1, "is not finite"),
        ((0, 0, 1, 1), np.nan, "is not finite"),
        ((5, 0, 4, 1), 1, "ends before it begins"),
        ((0, 5, 1, 4), 1, "ends before it begins"),
        ((0, 0, 21.5, 1), 1, "lies outside its image"),
        ((0, 0, 1, 11.5), 1, "lies outside its image"),
        ((-1.5, 0, 1, 1), 1, "lies outside its image"),
    ],
)
def test_check_names_the_box(path, box, score, cause):
    boxes = np.array([[0, 0, 20, 10], box, [-0.5, 0, 20.5, 10.5]], np.float32)
    write_plain(path, boxes=boxes, scores=np.array([1, score, 1], np.float32))
    with pytest.raises(ArtifactError, match=rf"P1\.h5 cannot be used: image b: box \(.*\) with score .* {cause}"):
        ProposalFile(path).check({"a": (20, 10), "b": (20, 10)})


def test_check_uses_the_size_of_each_image(path):
    write_plain(path, image_ids=["a", "empty", "b"], offsets=np.array([0, 1, 1, 3]))
    file = ProposalFile(path)
    file.check({"a": (10, 10), "b": (5, 5), "empty": (1, 1)})
    with pytest.raises(ArtifactError, match=r"image a: .* outside"):
        file.check({"a": (5, 5), "b": (10, 10)})
    with pytest.raises(ArtifactError, match=r"image b: .* outside"):
        file.check({"a": (10, 10), "b": (2, 2)})
    with pytest.raises(ArtifactError, match="no entry for image c"):
        file.check({"c": (5, 5)})
    file.check({"b": (5, 5)})


def test_check_sees_rows_beyond_the_first_block(path, monkeypatch):
    monkeypatch.setattr("cache.proposals.CHECK_ROWS", 2)
    write_plain(path, boxes=np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 0, 1, 1]], np.float32))
    with pytest.raises(ArtifactError, match="image b"):
        ProposalFile(path).check({})


def test_one_image_is_read_not_all(path):
    write(path, [2000] * 100)  # 4 MB
    file = ProposalFile(path)
    tracemalloc.start()
    file.get("000050")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def expected_sum(count):
    return sum(float(proposals(7, number)[1].sum()) for number in range(count))


def read_sum(file):
    return sum(float(file.get(image_id)[1].sum()) for image_id in file.image_ids)


def test_threads_share_one_file(path):
    write(path, [7] * 50)
    file = ProposalFile(path)
    file.close()
    sums = []
    threads = [threading.Thread(target=lambda: sums.append(read_sum(file))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [expected_sum(50)] * 8


def test_pickle_carries_no_handle(path):
    write(path, [7] * 50)
    with ProposalFile(path) as file:
        file.get("000000")
        copy = pickle.loads(pickle.dumps(file))
    assert read_sum(copy) == expected_sum(50)


def test_file_that_was_replaced_is_not_mixed(path):
    write(path, [7, 7])
    file = ProposalFile(path)
    write(path, [5, 9])
    assert len(file.get("000001")[1]) == 7
    file.close()
    with pytest.raises(ArtifactError, match="replaced while it was in use"):
        file.get("000001")


def test_forked_workers_read_at_the_same_time(path):
    write(path, [700] * 20)
    code = """
import os, pathlib, sys, threading
import numpy as np
from cache import proposals
file = proposals.ProposalFile(pathlib.Path(sys.argv[1]))
expected = [file.get(image_id)[0] for image_id in file.image_ids]
proposals._lock.acquire()  # as another thread may hold it when the worker is forked
workers = []
for _ in range(3):
    worker = os.fork()
    if not worker:
        break
    workers.append(worker)
if worker:
    proposals._lock.release()
for _ in range(5):
    for image_id, boxes in zip(file.image_ids, expected):
        if not np.array_equal(file.get(image_id)[0], boxes):
            os._exit(1)
if file._open_file[0] != os.getpid():
    os._exit(2)
if not worker:
    os._exit(0)
sys.exit(any([os.waitpid(worker, 0)[1] for worker in workers]))
"""
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True, timeout=60)


def test_import_costs_neither_h5py_nor_torch():
    code = "import sys, cache.proposals, cache.records, cache.lock; assert not {'h5py', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
