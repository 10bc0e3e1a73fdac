"""Data sets by name."""

from pathlib import Path

import pytest

from altopt.datasets import voc_archives
from altopt.datasets.voc_archives import VOC07, VOC07_MINI, VOC12
from altopt.errors import UsageError
from stages.pipeline.fetching import fetch_data_set


@pytest.fixture
def obtained(monkeypatch):
    calls = []
    monkeypatch.setattr(voc_archives, "obtain", lambda root, **options: calls.append((root, options["archives"])))
    return calls


@pytest.mark.parametrize(("name", "subset", "root", "archives"), [
    ("voc07", None, "data", VOC07), ("voc12", None, "data", VOC12), ("voc07", "mini", "data/voc07-mini", VOC07_MINI)])
def test_a_name_says_which_archives_and_where(obtained, name, subset, root, archives):
    fetch_data_set(name, subset=subset)
    fetch_data_set(name, Path("elsewhere"), subset=subset)
    assert obtained == [(Path(root), archives), (Path("elsewhere"), archives)]


def test_a_manifest_takes_the_place_of_the_archives_alone(obtained, tmp_path):
    manifest = tmp_path / "mine.toml"
    manifest.write_text(f'[[archive]]\nname = "a.tar"\nsize = 5\nsha256 = "{"0" * 64}"\n')
    fetch_data_set("voc07", subset="mini", manifest=manifest)
    fetch_data_set("voc12", manifest=manifest)
    (_, [mini]), (_, [voc12]) = obtained
    assert (mini.name, mini.mini, mini.urls) == ("a.tar", True, ())
    assert (voc12.mini, voc12.folder) == (False, "VOCdevkit/VOC2012")


def test_what_is_not_known_is_refused(obtained):
    with pytest.raises(UsageError, match=r"knows no data set 'coco': choose one of voc07, voc12$"):
        fetch_data_set("coco")
    assert obtained == []
