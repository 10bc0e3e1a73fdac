import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import Reports, open_tiny

from altopt.datasets.dataset import DataConfig
from altopt.errors import ResourceError, UsageError
from cache.files import sha256_file
from cache.proposals import ProposalFile
from stages.shared.events import ImagesDone
from stages.shared.step import Runtime
from stages.steps.selective_search import (
    SelectiveSearch,
    SelectiveSearchTest,
    search_step,
    selective_search,
    selective_search_test,
    to_proposals,
)

ROOT = Path(__file__).parents[3]
cv2 = pytest.importorskip("cv2")
pytestmark = pytest.mark.skipif(not hasattr(cv2, "ximgproc"), reason="OpenCV without its contrib modules")

DATA = DataConfig(format="shapes", train=("train:4",), test=("test:2",), width=96, height=80)
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.stages.steps.test_selective_search_stage import search

def report(event):
    if event.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

search(Path(sys.argv[1]), workers=int(sys.argv[2]), report=report)
"""


def search(out, stage=selective_search, cls=SelectiveSearch, workers=0, report=None, inputs_key="", **settings):
    config = cls(data=DATA, **({"min_side": 8.0} | settings))
    return stage(out=out, config=config, runtime=Runtime(workers=workers, inputs_key=inputs_key,
                                                         report=report or Reports()))


def read(path):
    with ProposalFile(path) as file:
        return {image_id: file.get(image_id) for image_id in file.image_ids}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """P0.h5 of an uninterrupted search in place."""
    out = tmp_path_factory.mktemp("whole") / "P0.h5"
    search(out)
    return out


def stop_after(count):
    def act():
        raise KeyboardInterrupt

    return Reports(at=lambda event: isinstance(event, ImagesDone) and event.done == count, act=act)


def test_every_image_in_order_with_ranks(whole):
    found = read(whole)
    assert list(found) == [f"train-{number:05}" for number in range(4)]
    for boxes, scores in found.values():
        assert len(boxes)
        assert scores[0] == 1
        assert (np.diff(scores) < 0).all()
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 8).all()
        assert len(np.unique(boxes, axis=0)) == len(boxes)
        assert (boxes >= 0).all()
        assert (boxes <= [96, 80, 96, 80]).all()
    with ProposalFile(whole) as file:
        settings = file.attributes["settings"]
    assert isinstance(settings, dict)
    assert settings["mode"] == "fast"
    assert settings["by"].startswith("OpenCV ")
    assert [path.name for path in whole.parent.iterdir()] == ["P0.h5"]


def test_facts_and_progress(tmp_path):
    reports = Reports()
    facts = search(tmp_path / "T0.h5", selective_search_test, SelectiveSearchTest, report=reports)
    assert list(read(tmp_path / "T0.h5")) == ["test-00000", "test-00001"]
    assert facts["images"] == 2
    assert facts["proposals"] == sum(len(scores) for _, scores in read(tmp_path / "T0.h5").values())
    assert reports.events == [ImagesDone(1, 2), ImagesDone(2, 2)]


def test_processes_give_the_same_bytes(tmp_path, whole):
    search(tmp_path / "P0.h5", workers=2)
    assert sha256_file(tmp_path / "P0.h5") == sha256_file(whole)


def test_stopped_and_gone_on_with(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "P0.h5", report=stop_after(3))
    assert [path.name for path in tmp_path.iterdir()] == ["P0.partial.jsonl"]
    reports = Reports()
    calls = []
    original = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation

    def counted():
        calls.append(1)
        return original()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv2.ximgproc.segmentation, "createSelectiveSearchSegmentation",
                      counted)
        search(tmp_path / "P0.h5", report=reports)
    assert len(calls) == 1  # of four images three were done
    assert [event.done for event in reports.of(ImagesDone)] == [1, 2, 3, 4]
    assert sha256_file(tmp_path / "P0.h5") == sha256_file(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["P0.h5"]


def test_what_another_search_began_is_not_used(tmp_path):
    for change in ({"search_seed": 4}, {"inputs_key": "other data"}, {"mode": "quality"}):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "P0.h5", report=stop_after(2))
        search(tmp_path / "P0.h5", **change)
        search(tmp_path / "fresh.h5", **change)
        assert sha256_file(tmp_path / "P0.h5") == sha256_file(tmp_path / "fresh.h5")


def children(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_killed_and_gone_on_with(tmp_path, whole):
    done = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "P0.h5"), "1"], cwd=ROOT,
                            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    seen: set[str] = set()
    while done.poll() is None:
        try:
            seen |= set(children(done.pid))
        except OSError:
            break
        time.sleep(0.02)
    assert done.wait() == -signal.SIGKILL
    assert (tmp_path / "P0.partial.jsonl").is_file()
    assert seen
    deadline = time.monotonic() + 20
    while any(alive(child) for child in seen) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in seen if alive(child)]  # nothing is left behind
    search(tmp_path / "P0.h5")
    assert sha256_file(tmp_path / "P0.h5") == sha256_file(whole)


def alive(process):
    """Whether it runs; a zombie that nobody has asked for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def die(*arguments):
    os._exit(9)


def test_a_process_that_dies(tmp_path, monkeypatch):
    monkeypatch.setattr("altopt.datasets.selective_search.selective_search", die)
    with pytest.raises(ResourceError, match=r"a process that searched train-0000. ended by itself"):
        search(tmp_path / "P0.h5", workers=1)


def test_without_opencv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="selective search needs OpenCV"):
        search(tmp_path / "P0.h5")
    assert list(tmp_path.iterdir()) == []


def test_boxes_in_the_original_frame():
    config = SelectiveSearch(data=DATA, min_side=10.0, proposals=2)
    found = ("a", [[0, 0, 33, 25], [1, 2, 3, 4], [3, 5, 10, 20], [0, 0, 20, 20]], [33, 25])
    boxes = to_proposals(found, (100, 50), config)
    assert boxes.dtype == np.float32
    assert boxes.tolist() == [[0, 0, 100, 50], pytest.approx([100 / 11, 10, 1300 / 33, 50])]
    assert to_proposals(("a", [], [33, 25]), (100, 50), config).shape == (0, 4)


def test_a_smaller_image_is_searched(tmp_path):
    search(tmp_path / "P0.h5", search_side=40)
    for boxes, _ in read(tmp_path / "P0.h5").values():
        assert ((boxes * 0.5) % 1 == 0).all()  # whole pixels of the image at half its size
        assert boxes.max() <= 96


def test_as_a_step_of_a_run(tmp_path):
    run = open_tiny(tmp_path / "tiny")
    steps = [search_step("P0")], [search_step("T0")]
    for step, images in zip(steps, (6, 4), strict=True):
        assert [each.output for each in run.bring_up_to_date(step)] == [step[0].output]
        assert run.bring_up_to_date(step) == []
        record = run.record(step[0].output)
        assert record.metrics["images"] == images
        assert record.data == run.data_digest(step[0])
    with pytest.raises(UsageError, match="'M1' is not a name for proposals"):
        search_step("M1")
