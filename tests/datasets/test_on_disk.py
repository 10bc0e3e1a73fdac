import pytest

from altopt.datasets.on_disk import Findings, below, inside
from altopt.errors import DataError


@pytest.mark.parametrize("name", ["../a.jpg", "sub/../../a.jpg", "/etc/passwd", "a\0b"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out"):
        below(tmp_path, name)


def test_a_link_must_not_lead_out_but_the_folder_may_be_one(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "a.jpg").touch()
    (root / "linked").symlink_to(elsewhere)
    assert inside(root, root / "linked", "a.jpg").exists()
    (root / "kept.jpg").touch()
    (elsewhere / "back.jpg").symlink_to(root / "kept.jpg")
    assert inside(root, root / "linked", "back.jpg").exists()
    (root / "b.jpg").symlink_to(elsewhere / "a.jpg")
    for name in ("b.jpg", "linked/a.jpg"):
        with pytest.raises(DataError, match="leads out of the data root to"):
            inside(root, root, name)


def test_verdict_names_the_first_problem_and_counts_the_others():
    findings = Findings(unusable=["x, object 1: bad", "x, object 2: bad"], warnings=["thin"])
    with pytest.raises(DataError, match=r"^x, object 1: bad \(hint\): correct .*leave-out.*; 1 more problem in VOC$"):
        findings.verdict("VOC", "error", "hint")
    assert findings.verdict("VOC", "leave-out") == [
        "x, object 1: bad; the object is left out",
        "x, object 2: bad; the object is left out",
        "thin",
    ]
    findings.broken = ["a.jpg is missing: bring it"] * 3
    with pytest.raises(DataError, match=r"^a\.jpg is missing: bring it; 2 more problems in VOC$"):
        findings.verdict("VOC", "leave-out")
    assert Findings(warnings=["thin"]).verdict("VOC", "error") == ["thin"]
