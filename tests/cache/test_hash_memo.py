import json
import os
import time

import pytest

from altopt.errors import DataError
from cache import files
from cache.files import Memo, digest_files, sha256_file


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files whose content was read for a hash, in order."""
    names = []
    original = files._hash

    def hashed(path):
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(files, "_hash", hashed)
    return names


def write(path, text, age=100.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    moment = int(time.time() - age)
    os.utime(path, (moment, moment))
    return path


def test_second_question_reads_nothing(tmp_path, hashed):
    path = write(tmp_path / "x", "1")
    memo = Memo(tmp_path / "memo.json")
    first = memo.sha256(path)
    memo.save()
    assert Memo(tmp_path / "memo.json").sha256(path) == first
    assert hashed == ["x"]
    assert first == sha256_file(path)


def test_changed_size_or_time_is_hashed_anew(tmp_path):
    memo = Memo(tmp_path / "memo.json")
    path = write(tmp_path / "x", "1")
    memo.sha256(path)
    write(path, "22")
    assert memo.sha256(path) == sha256_file(path)
    write(path, "33", age=50.0)
    assert memo.sha256(path) == sha256_file(path)


def test_young_file_is_never_taken_from_memory(tmp_path):
    memo = Memo(tmp_path / "memo.json")
    path = write(tmp_path / "x", "1", age=0.0)
    memo.sha256(path)
    status = path.stat()
    path.write_text("2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert memo.sha256(path) == sha256_file(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"version": 1}',
        b'{"version": 1, "files": {"x": 5}, "lists": {}}',
        b'{"version": 99, "files": {}, "lists": {}}',
    ],
)
def test_damaged_memo_counts_as_empty(tmp_path, content):
    path = write(tmp_path / "x", "1")
    (tmp_path / "memo.json").write_bytes(content)
    memo = Memo(tmp_path / "memo.json")
    assert memo.sha256(path) == sha256_file(path)
    memo.save()
    assert json.loads((tmp_path / "memo.json").read_text())["files"]


def test_memo_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "memo.json").mkdir()
    memo = Memo(tmp_path / "memo.json")
    memo.sha256(write(tmp_path / "x", "1"))
    memo.save()
    assert (tmp_path / "memo.json").is_dir()


def test_memo_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MEMO_ENTRIES", 2)
    memo = Memo(tmp_path / "memo.json")
    for name in "abc":
        memo.sha256(write(tmp_path / name, name))
    memo.save()
    kept = json.loads((tmp_path / "memo.json").read_text())["files"]
    assert [name[-1] for name in kept] == ["b", "c"]


def data_set(root):
    return [write(root / "a.xml", "a"), write(root / "deep" / "b.jpg", "b")]


def digest(paths, tmp_path, root, **description):
    memo = Memo(tmp_path / "memo.json")
    result = digest_files(paths, description, memo, root)
    memo.save()
    return result


def test_digest_does_not_depend_on_place_or_order(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    expected = digest(data_set(here), tmp_path, here, split="train")
    assert digest(data_set(there)[::-1], tmp_path, there, split="train") == expected


def test_digest_depends_on_description_names_and_content(tmp_path):
    here = tmp_path / "here"
    paths = data_set(here)
    digests = {digest(paths, tmp_path, here, split="train"), digest(paths, tmp_path, here, split="test")}
    digests.add(digest(paths[:1], tmp_path, here, split="train"))
    write(paths[0], "A", age=50.0)
    digests.add(digest(paths, tmp_path, here, split="train"))
    renamed = paths[0].rename(here / "renamed.xml")
    digests.add(digest([renamed, paths[1]], tmp_path, here, split="train"))
    renamed = paths[1].rename(here / "b.jpg")
    digests.add(digest([here / "renamed.xml", renamed], tmp_path, here, split="train"))
    assert len(digests) == 6


def test_digest_of_a_settled_list_reads_nothing_again(tmp_path, hashed):
    paths = data_set(tmp_path / "here")
    memo = Memo(tmp_path / "memo.json")
    first = digest_files(paths, {}, memo, tmp_path)
    memo.save()
    assert digest_files(paths, {}, Memo(tmp_path / "memo.json"), tmp_path) == first
    assert hashed == ["a.xml", "b.jpg"]
    write(paths[1], "B", age=50.0)
    assert digest_files(paths, {}, Memo(tmp_path / "memo.json"), tmp_path) != first


def test_digest_of_a_young_list_is_not_remembered(tmp_path, hashed):
    path = write(tmp_path / "x", "1", age=0.0)
    memo = Memo(tmp_path / "memo.json")
    assert digest_files([path], {}, memo, tmp_path) == digest_files([path], {}, memo, tmp_path)
    assert hashed == ["x", "x"]


def test_files_outside_the_root_count_by_name(tmp_path):
    one, two = write(tmp_path / "1" / "x", "1"), write(tmp_path / "2" / "x", "1")
    memo = Memo(tmp_path / "memo.json")
    assert digest_files([one], {}, memo, tmp_path / "root") == digest_files([two], {}, memo, None)


def test_digest_of_nothing(tmp_path):
    assert digest([], tmp_path, None, kind="shapes") != digest([], tmp_path, None, kind="voc")


def test_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.jpg cannot be read: No such file"):
        digest([tmp_path / "a.jpg"], tmp_path, tmp_path)
