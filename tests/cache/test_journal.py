from contextlib import closing

import pytest

from altopt.errors import ArtifactError, ResourceError
from cache.journal import Journal

ITEMS = [["a", [[1, 2, 3, 4]]], ["é", []], {"c": 0.5}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sub" / "P0.partial.jsonl"


def write(path, items, key="task"):
    with closing(Journal(path, key)) as journal:
        kept = list(journal.kept())
        for item in items:
            journal.append(item)
    return kept


def test_items_come_back_in_order_and_go_on(path):
    assert write(path, ITEMS[:2]) == []
    assert write(path, ITEMS[2:]) == ITEMS[:2]
    assert write(path, []) == ITEMS


def test_another_task_begins_anew(path):
    write(path, ITEMS)
    assert write(path, ITEMS[:1], "other") == []
    assert write(path, [], "other") == ITEMS[:1]


def test_cut_off_anywhere(path):
    write(path, ITEMS)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = write(path, [])
        assert kept == ITEMS[: len(kept)]
        left = ITEMS[len(kept):]
        assert write(path, left) == kept
        assert path.read_bytes() == whole


def test_a_damaged_line_and_those_behind_it_count_as_not_there(path):
    write(path, ITEMS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"[", b"{"), lines[3]]))
    assert write(path, []) == ITEMS[:1]


def test_remove(path):
    journal = Journal(path, "task")
    list(journal.kept())
    assert path.is_file()
    journal.remove()
    assert not path.exists()


def test_full_disk(path, file_size_limit):
    write(path, ITEMS)
    with file_size_limit(path.stat().st_size + 5), pytest.raises(ResourceError, match="make room"):
        write(path, ITEMS)
    assert write(path, []) == ITEMS


def test_folder_that_cannot_be_made(path):
    path.parent.write_text("a file")
    with pytest.raises(ArtifactError):
        write(path, [])
