from altopt.datasets.checking import Finding, Look
from stages.console.checking import check_lines
from stages.pipeline.checking import DataCheck


def test_findings_are_grouped_and_counted():
    bad = [Finding("box", f"object {number}") for number in range(5)]
    look = Look("VOC train", [*bad, Finding("file", "a.jpg"), Finding("thin", "thin", "warning")], classes={})
    assert check_lines(DataCheck("words", {"train": look}, [])).splitlines() == [
        "words", "6 problems", "  box (5)", "    object 0", "    object 1", "    object 2",
        "    ... and 2 more, which --json lists", "  file (1)", "    a.jpg", "1 warning", "  thin (1)", "    thin",
        "train: VOC train: 0 images, 0 objects"]


def test_nothing_found():
    assert check_lines(DataCheck("words", {}, [])).splitlines() == ["words", "no problems", "no warnings"]


def test_nothing_reaches_the_terminal_but_text():
    look = Look("VOC train", [Finding("box", "a\x1b[31m\nb\ud800")], classes={"\x07": 1})
    text = check_lines(DataCheck("words", {"train": look}, []))
    assert r"    a\x1b[31m\nb\ud800" in text.splitlines()
    assert r"(\x07 1)" in text
