import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import Reports, open_tiny

import cli
from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from altopt.errors import ArtifactError, UsageError
from altopt.evaluation.recall import proposal_recall
from cache.proposals import ProposalFile
from stages.pipeline.importing import export_proposals, import_proposals, open_split, read_proposals
from stages.steps.selective_search import search_step

VOC = """<annotation><size><width>{}</width><height>{}</height><depth>3</depth></size><object><name>thing</name>
<bndbox><xmin>51</xmin><ymin>51</ymin><xmax>150</xmax><ymax>150</ymax></bndbox></object></annotation>"""


@pytest.fixture
def run(tmp_path):
    return open_tiny(tmp_path / "tiny")


def covering(run, artifact="P0"):
    """Proposals that are the objects themselves, and a box of the whole image; continuous."""
    dataset = open_split(run, artifact)
    whole = {id: np.array([[0, 0, *dataset.size(id)]], np.float32) for id in dataset.ids}
    return {id: np.concatenate([dataset.objects(id).boxes, whole[id]]) for id in dataset.ids}


def save(path, boxes, **more):
    content = {"image_ids": list(boxes), "boxes": [np.asarray(each).tolist() for each in boxes.values()]}
    path.write_text(json.dumps(content | more))
    return path


def texts(run):
    return " | ".join(run.runtime.report.texts())


def stored(run, artifact="P0"):
    with ProposalFile(run.path(artifact)) as file:
        return {id: file.get(id) for id in file.image_ids}


@pytest.mark.parametrize("artifact", ["P0", "T0", "P1"])
def test_becomes_a_given_artifact(run, tmp_path, artifact):
    boxes = covering(run, artifact)
    result = import_proposals(run, save(tmp_path / "mine.json", boxes), artifact)
    assert {id: each[0].tolist() for id, each in stored(run, artifact).items()} == {
        id: each.tolist() for id, each in boxes.items()}
    assert "imported from mine.json" in run.record(artifact).given
    assert result["limits"]["2000"]["areas"]["all"]["recall"][0] == 1
    assert result["boxes"] == sum(map(len, boxes.values()))
    assert "0.5: 1.000" in texts(run)
    with ProposalFile(run.path(artifact)) as file:
        file.check({id: open_split(run, artifact).size(id) for id in boxes})
        assert [len(str(file.attributes[name])) for name in ("dataset", "source_sha256")] == [64, 64]


def test_recall_is_said_before_anything_is_written(run, tmp_path):
    there = []
    run.runtime.report = Reports(at=lambda event: "recall on" in getattr(event, "text", ""),
                                 act=lambda: there.append(run.path("P0").exists()))
    import_proposals(run, save(tmp_path / "mine.json", covering(run)), "P0")
    assert there == [False]


@pytest.mark.parametrize("name", ["P", "M1", "T10", "D2", "../P1"])
def test_other_names(run, tmp_path, name):
    with pytest.raises(UsageError, match="not a name for proposals"):
        import_proposals(run, save(tmp_path / "mine.json", covering(run)), name)


def test_ids_of_other_spellings(run, tmp_path):
    boxes = {f"JPEGImages/{id}.jpg": each for id, each in covering(run).items()}
    import_proposals(run, save(tmp_path / "mine.json", boxes), "P0")
    assert list(stored(run)) == list(covering(run))


def test_missing_images(run, tmp_path):
    boxes = covering(run)
    missing = list(boxes)[1:3]
    path = save(tmp_path / "mine.json", {id: each for id, each in boxes.items() if id not in missing})
    words = f"no entry for 2 of 6 images .*{missing[0]}, {missing[1]}: .*--allow-missing"
    with pytest.raises(ArtifactError, match=words):
        import_proposals(run, path, "P0")
    assert not run.path("P0").exists()
    assert run.record("P0") is None
    result = import_proposals(run, path, "P0", allow_missing=True)
    assert {id for id, (each, _) in stored(run).items() if not len(each)} == set(missing)
    assert result["images_missing"] == 2
    assert f"2 images get no proposals: {missing[0]}, {missing[1]}" in texts(run)
    assert result["limits"]["2000"]["areas"]["all"]["recall"][0] < 1


def test_foreign_images_are_left_out_and_named(run, tmp_path):
    foreign = {f"other-{number}": [[0, 0, 9, 9]] for number in range(5)}
    result = import_proposals(run, save(tmp_path / "mine.json", covering(run) | foreign), "P0")
    assert set(stored(run)) == set(covering(run))
    assert result["images_foreign"] == 5
    words = "5 images of the file are not in shapes train:6 and are left out: other-0, other-1, other-2, ..."
    assert words in texts(run)


def test_the_other_splits_file(run, tmp_path):
    with pytest.raises(ArtifactError, match=r"it names test-00000, test-00001, test-00002, \.\.\., which are not"):
        import_proposals(run, save(tmp_path / "mine.json", covering(run, "T0")), "P0")


def test_a_image_with_two_entries(run, tmp_path):
    boxes = covering(run)
    first = next(iter(boxes))
    with pytest.raises(ArtifactError, match=f"two entries for image {first}"):
        import_proposals(run, save(tmp_path / "mine.json", boxes | {f"{first}.png": [[0, 0, 1, 1]]}), "P0")


def test_boxes_that_cannot_be_used(run, tmp_path):
    boxes = covering(run)
    first = next(iter(boxes))
    boxes[first] = np.concatenate([boxes[first], [[0, 0, 500, 10], [9, 9, 5, 5]]])
    path = save(tmp_path / "mine.json", boxes)
    with pytest.raises(ArtifactError, match=f"1 ending before they begin and 1 outside their image, first .*{first}.*"
                                            "--box-format .*--invalid leave-out"):
        import_proposals(run, path, "P0")
    assert not run.path("P0").exists()
    assert "recall on" in texts(run)
    result = import_proposals(run, path, "P0", invalid="leave-out")
    assert (result["boxes_left_out"], len(stored(run)[first][0])) == (2, len(boxes[first]) - 2)


def test_a_failed_import_leaves_the_artifact_there(run, tmp_path):
    import_proposals(run, save(tmp_path / "mine.json", covering(run)), "P0")
    before = run.path("P0").read_bytes()
    with pytest.raises(ArtifactError):
        import_proposals(run, save(tmp_path / "less.json", {"x": []}), "P0")
    assert run.path("P0").read_bytes() == before
    assert run.record("P0").given


def test_wrong_frame_shows_at_once_and_the_right_one_is_taken(run, tmp_path):
    swapped = {id: each[:, [1, 0, 3, 2]] + [1, 1, 0, 0] for id, each in covering(run).items()}
    path = save(tmp_path / "mine.json", swapped)
    with pytest.raises(ArtifactError, match="outside their image"):
        import_proposals(run, path, "P0")
    assert "with x and y exchanged" in texts(run)
    assert import_proposals(run, path, "P0", box_format="yxyx-inclusive-1")["box_format"] == "yxyx-inclusive-1"
    assert {id: each.tolist() for id, (each, _) in stored(run).items()} == {
        id: each.tolist() for id, each in covering(run).items()}


def test_a_pickle_is_not_executed(run, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "mine.pkl").write_bytes(pickle.dumps([Attack()]))
    with pytest.raises(ArtifactError, match="asks to run"):
        import_proposals(run, tmp_path / "mine.pkl", "P0")
    assert not (tmp_path / "made").exists()


def test_unknown_and_missing_files(run, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UsageError, match=r"no known format: it must end in one of \.h5"):
        read_proposals(tmp_path / "mine.txt", ())
    with pytest.raises(ArtifactError, match="not there"):
        read_proposals(tmp_path / "none.json", ())


@pytest.mark.parametrize(("name", "form"), [
    ("out.h5", None), ("out.json", None), ("out.pkl", "detectron2"), ("out.pkl", "py-faster-rcnn"), ("out.x", "json"),
])
def test_exported_and_imported_again(run, tmp_path, name, form):
    random = np.random.default_rng(0)
    corners = {id: np.sort(random.uniform(0, 80, (7, 2, 2)).astype(np.float32), 1).reshape(7, 4)
               for id in covering(run)}
    corners[next(iter(corners))] = np.empty((0, 4), np.float32)
    scores = [np.sort(random.random(len(each)))[::-1].tolist() for each in corners.values()]
    shuffled = dict(sorted(corners.items(), reverse=True))
    import_proposals(run, save(tmp_path / "mine.json", shuffled, scores=scores[::-1]), "P0")
    before = stored(run)
    result = export_proposals(run, "P0", tmp_path / name, form)
    assert (result["images"], result["file"]) == (6, str(tmp_path / name))
    if name == "out.x":
        shutil.move(tmp_path / name, tmp_path / "out.json")
        name = "out.json"
    import_proposals(run, tmp_path / name, "P1")
    after = stored(run, "P1")
    assert set(after) == set(before)
    for id, (boxes, ranks) in after.items():
        if form == "py-faster-rcnn":  # one pixel off and on again, and no scores
            assert np.allclose(boxes, before[id][0], atol=1e-5)
            assert ranks.tolist() == pytest.approx([(len(ranks) - n) / len(ranks) for n in range(len(ranks))])
        else:
            assert np.array_equal(boxes, before[id][0])
            assert np.array_equal(ranks, before[id][1])


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(ArtifactError, match=r"P1\.h5 is not in"):
        export_proposals(run, "P1", tmp_path / "out.json")
    import_proposals(run, save(tmp_path / "mine.json", covering(run)), "P0")
    with pytest.raises(UsageError, match="--format hdf5"):
        export_proposals(run, "P0", tmp_path / "out.pkl")
    with pytest.raises(UsageError, match="not a name for proposals"):
        export_proposals(run, "M1", tmp_path / "out.json")


def test_voc_and_a_selective_search_file(tmp_path):
    """A .mat as fast-rcnn ships it, against annotations counted the same way: recall tells that the format is right."""
    savemat = pytest.importorskip("scipy.io").savemat
    run, root = voc_run(tmp_path)
    cells = np.empty(2, object)
    cells[:] = [np.array([[51, 51, 150, 150], [1, 1, 200, 300]], np.uint16)] * 2
    names = np.empty((2, 1), object)
    names[:, 0] = ["000002", "000001"]
    savemat(root / "boxes.mat", {"boxes": cells.reshape(1, -1), "images": names})
    result = import_proposals(run, root / "boxes.mat", "P0")
    assert result["limits"]["2000"]["areas"]["all"]["recall"][-1] == 1
    assert result["images_without_scores"] == 2
    assert stored(run)["000002"][0].tolist() == [[50, 50, 150, 150], [0, 0, 300, 200]]
    assert run.runtime.report.texts()[1:] == ["2 images have no scores: the order of their boxes stands for them"]


def voc_run(tmp_path):
    """A run whose data set is two images, 300 x 200, with an object each."""
    from PIL import Image

    root = tmp_path / "data"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/trainval.txt").write_text("000001\n000002\n")
    for name in ("000001", "000002"):
        Image.new("RGB", (300, 200)).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(VOC.format(300, 200))
    recipe = tmp_path / "voc.toml"
    recipe.write_text('[network]\nname = "small"\n[data]\nformat = "voc"\ntrain = ["trainval"]\ntest = ["trainval"]\n')
    run = open_tiny(tmp_path / "voc", recipe=recipe)
    run.runtime.data_root = root
    return run, root


@pytest.mark.skipif("ALTOPT_DATA" not in os.environ, reason="ALTOPT_DATA names no folder of data sets")
def test_recall_of_boxes_that_fast_rcnn_ships():
    """Objects brought to the frame of the full image: all are covered, and less well with x and y exchanged."""
    pytest.importorskip("scipy.io")
    root = Path(os.environ["ALTOPT_DATA"])
    config = DataConfig(format="voc", train=("2007_trainval",), test=("2007_test",))
    dataset = open_dataset(config, "train", root / "voc07-mini")
    (name, boxes, _), = read_proposals(root / "proposals" / "001551_boxes.mat", dataset.ids)
    objects = dataset.objects(name)
    scaled = objects.usable().boxes * np.tile(np.divide((500, 375), dataset.size(name)), 2)
    recall, swapped = (proposal_recall([(scaled, each)], (5000,)) for each in (boxes, boxes[:, [1, 0, 3, 2]]))
    print(f"{name}: recall {recall.at(5000)[0]:.3f}, average {recall.average(5000):.3f} of {len(scaled)} objects; "
          f"with x and y exchanged {swapped.average(5000):.3f}")
    assert recall.at(5000)[0] == 1
    assert swapped.average(5000) < recall.average(5000) - 0.1


def test_commands(altopt, workplace):
    pytest.importorskip("cv2")
    answer = altopt("proposals", "selective-search", "--as", "p0", "--recipe", "tiny.toml", "--workers", 0)
    assert answer.code == 0, answer.err
    assert "P0: done" in answer.err
    again = altopt("proposals", "selective-search", "--as", "P0", "--recipe", "tiny.toml")
    assert "P0 is up to date: nothing to do" in again.err
    assert altopt("proposals", "export", "P0", "out.json", "--run", "tiny").out == "out.json: P0 as json, 6 images\n"
    shown = altopt("proposals", "import", "out.json", "--as", "P1", "--run", "tiny")
    assert shown.code == 0
    assert shown.out.startswith("runs/tiny/P1.h5: ")
    assert "recall on shapes train:6 at IoU 0.5: " in shown.err
    plain = json.loads(altopt("proposals", "import", "out.json", "--as", "P1", "--run", "tiny", "--json").out)
    assert (plain["artifact"], plain["images"]) == ("P1", 6)
    wrong = altopt("proposals", "import", "out.json", "--as", "T0", "--run", "tiny")
    assert (wrong.code, wrong.out) == (4, "")
    assert "--allow-missing" in wrong.err.splitlines()[-1]
    assert altopt("proposals", "import", "out.json", "--as", "P1", "--box-format", "yx", "--run", "tiny").code == 2
    assert "Did you mean 'export'" in altopt("proposals", "exprt").err


def test_help_of_import_lists_the_frames(altopt):
    from altopt.proposal_formats.reader import BOX_FORMATS

    assert tuple(BOX_FORMATS) == cli.BOX_FORMATS
    text = altopt("proposals", "import", "--help").out
    assert all(name in text for name in BOX_FORMATS)


def test_searched_and_imported_are_told_apart(run, tmp_path):
    pytest.importorskip("cv2")
    run.bring_up_to_date([search_step("P0")])
    assert run.verdict(search_step("P0")).state == "done"
    import_proposals(run, save(tmp_path / "mine.json", covering(run)), "P0")
    assert run.verdict(search_step("P0")).state == "given"
