import json
import shutil

import pytest
from tiny_runs import config_as, hashes, open_tiny

import stages.pipeline.evaluation
from altopt.datasets.voc import VOC_CLASSES
from altopt.errors import ArtifactError, UsageError
from altopt.evaluation.detections import read_detections
from altopt.evaluation.recall import LIMITS
from altopt.evaluation.scoring import score
from cache.checkpoints import load_checkpoint, save_checkpoint
from stages.console.reporting import beside_table
from stages.pipeline.evaluation import beside_published, detection_step, evaluate, recall, summary
from stages.pipeline.recipe import read_recipe
from stages.pipeline.run import Run
from stages.shared.detection import Detect
from stages.shared.step import Runtime


@pytest.fixture
def only_cached(monkeypatch):
    """Computing a score anew fails."""
    for name in ("_score", "_recall"):
        monkeypatch.setattr(stages.pipeline.evaluation, name, lambda *arguments: pytest.fail("computed again"))


@pytest.mark.parametrize(("word", "output"), [
    ("M5", "D5"), ("m5", "D5"), ("D5", "D5"), ("M1+M2", "D2"), ("m1 + m2", "D2"), ("d2", "D2"),
])
def test_names_of_what_can_be_evaluated(tmp_path, word, output):
    assert detection_step(open_tiny(tmp_path), word).output == output


@pytest.mark.parametrize("word", ["M4", "M2+M1", "P1", ""])
def test_nothing_else_can_be_evaluated(tmp_path, word):
    with pytest.raises(UsageError, match=r"nothing to evaluate under .*: choose M5 \(shared\) or M1\+M2 \(unshared\)"):
        detection_step(open_tiny(tmp_path), word)


def test_scores_of_both_networks(finished, copied):
    run = open_tiny(copied)
    config = config_as(Detect, run.recipe, detection_step(run, "M5"))
    dataset = stages.pipeline.evaluation.open_dataset(config.data, "test", None)
    for word, name in (("M1+M2", "M1+M2 (unshared)"), ("M5", "M5 (shared)")):
        result = evaluate(run, detection_step(run, word), "voc07")
        assert (result["name"], result["protocol"], result["images"]) == (name, "voc07", 4)
        assert list(result["classes"]) == ["circle", "square", "triangle", "cross", "ring"]
        found = read_detections(run.path(detection_step(run, word).output), dataset.ids, dataset.category_ids)
        again = score("voc07", {id: dataset.objects(id) for id in dataset.ids}, found, dataset.classes)
        assert result["map"] == again.map
        assert 0 <= result["recall_at_0.5"] <= 1
        assert result["seconds_per_image"] > 0


def test_detections_lie_in_their_images(finished):
    detections = json.loads((finished / "D5.detections.json").read_text())
    assert {each["image_id"] for each in detections} <= {f"test-{number:05}" for number in range(4)}
    assert detections
    for each in detections:
        x, y, width, height = each["bbox"]
        assert min(x, y, width, height) >= 0
        assert x + width <= 96 + 1e-3
        assert y + height <= 80 + 1e-3
        assert 0.05 <= each["score"] <= 1
        assert 1 <= each["category_id"] <= 5


def test_scores_are_kept(copied, only_cached):
    run = open_tiny(copied)
    kept = json.loads((copied / "metrics.json").read_text())
    assert evaluate(run, detection_step(run, "M5"), "voc07") == kept["D5 voc07"]["result"]
    assert recall(run, "P1", keep=True) == kept["P1 recall"]["result"]
    assert [each["name"] for each in summary(run, "voc07")["scores"]] == ["M1+M2 (unshared)", "M5 (shared)"]


def test_another_protocol_is_another_score(copied, monkeypatch):
    run = open_tiny(copied)
    before = hashes(copied, "D5")
    result = evaluate(run, detection_step(run, "M5"), "coco")
    assert result["protocol"] == "coco"
    assert "AP" in result["numbers"]
    assert json.loads((copied / "metrics.json").read_text()).keys() >= {"D5 voc07", "D5 coco"}
    assert hashes(copied, "D5") == before


def test_changed_network_is_detected_with_again(copied):
    tensors, description = load_checkpoint(copied / "M5.safetensors")
    tensors["head.cls_score.bias"][0] += 100
    save_checkpoint(copied / "M5.safetensors", tensors, description)
    run = open_tiny(copied)
    result = evaluate(run, detection_step(run, "M5"), "voc07")
    assert result["map"] == 0
    assert json.loads((copied / "D5.detections.json").read_text()) == []


def test_changed_detection_setting_is_detected_with_again(copied):
    run = open_tiny(copied, "detect.per_image=1")
    evaluate(run, detection_step(run, "M5"), "voc07")
    assert len(json.loads((copied / "D5.detections.json").read_text())) <= 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"D5 voc07": 3}'])
def test_damaged_scores_are_computed_again(copied, text):
    before = json.loads((copied / "metrics.json").read_text())["D5 voc07"]["result"]
    (copied / "metrics.json").write_text(text)
    assert evaluate(open_tiny(copied), detection_step(open_tiny(copied), "M5"), "voc07") == before


def test_recall_of_the_proposals(copied):
    run = open_tiny(copied)
    result = recall(run, "P2")
    assert (result["proposals"], result["split"]) == ("P2.h5", "shapes train:6")
    assert list(result["limits"]) == [str(limit) for limit in LIMITS]
    assert list(recall(run, "P2")["limits"]) == list(result["limits"])
    few, many = (recall(run, "P2", (limit,))["limits"][str(limit)]["areas"]["all"]["recall"] for limit in (1, 40))
    assert all(a <= b for a, b in zip(few, many, strict=True))
    assert many[0] > 0


def test_recall_alone_writes_nothing(copied):
    before = (copied / "metrics.json").read_bytes()
    recall(open_tiny(copied), "P2", (7,))
    assert (copied / "metrics.json").read_bytes() == before
    recall(open_tiny(copied), "P2", (7,), keep=True)
    assert (copied / "metrics.json").read_bytes() != before


def test_beside_published_figures(copied, monkeypatch):
    share = {"D2": 0.5, "D5": 0.6}

    def scored(run, step, protocol):
        assert protocol == "voc07"
        return {"classes": {name: {"ap": share[step.output]} for name in VOC_CLASSES}}

    monkeypatch.setattr(stages.pipeline.evaluation, "evaluate", scored)
    rows = beside_published(open_tiny(copied))
    assert [row["class"] for row in rows[:20]] == list(VOC_CLASSES)
    means = list(rows[-1].values())
    assert means[:3] == ["mAP", pytest.approx(50), pytest.approx(60)]
    assert means[3:] == [69.9, 68.5, 68.9]
    assert len(list(beside_table(rows).columns)) == 6


def test_beside_published_figures_in_another_scheme(tmp_path, monkeypatch):
    scored = {"classes": {name: {"ap": 0.7} for name in VOC_CLASSES}}
    monkeypatch.setattr(stages.pipeline.evaluation, "evaluate", lambda run, step, protocol: scored)
    run = Run(tmp_path, read_recipe("voc07-vgg16", (), "exact-joint"), Runtime())
    assert list(beside_published(run)[-1].items())[:2] == [("class", "mAP"), ("M1 (exact-joint)", pytest.approx(70))]


@pytest.mark.parametrize("artifact", ["P9", "M1", "x", ""])
def test_recall_of_something_else(copied, artifact):
    with pytest.raises(UsageError, match="choose P1 or P2"):
        recall(open_tiny(copied), artifact)


def test_recall_of_missing_proposals(copied):
    (copied / "P2.h5").unlink()
    with pytest.raises(ArtifactError, match=r"P2\.h5 is not in .*: make it with altopt stage P2"):
        recall(open_tiny(copied), "P2")


@pytest.mark.parametrize(("word", "missing"), [("M5", "M5"), ("M1+M2", "M1"), ("M1+M2", "M2")])
def test_missing_network(copied, word, missing):
    (copied / f"{missing}.safetensors").unlink()
    remedy = f"make it with altopt stage {missing}, or run-all"
    with pytest.raises(ArtifactError, match=rf"{missing} is not in .*: {remedy}"):
        evaluate(open_tiny(copied), detection_step(open_tiny(copied), word), "voc07")


def test_network_of_other_classes_is_refused(copied):
    tensors, description = load_checkpoint(copied / "M5.safetensors")
    description["classes"][0] = "disc"
    save_checkpoint(copied / "M5.safetensors", tensors, description)
    with pytest.raises(ArtifactError, match=r"knows the classes disc, square, .* and the data set has circle, square"):
        evaluate(open_tiny(copied), detection_step(open_tiny(copied), "M5"), "voc07")


def test_network_without_rpn_is_refused(copied):
    (copied / "M5.safetensors").unlink()
    shutil.copy(copied / "M4.safetensors", copied / "M5.safetensors")
    with pytest.raises(ArtifactError, match=r"M5\.safetensors has no rpn layers"):
        evaluate(open_tiny(copied), detection_step(open_tiny(copied), "M5"), "voc07")


def test_summary_of_a_whole_run(copied):
    result = summary(open_tiny(copied), "voc07")
    assert (result["recipe"], result["recall"].keys()) == ("tiny", {"P1", "P2"})
    assert list(result["stages"]) == ["M0", "M1", "P1", "M2", "M3", "P2", "M4", "M5"]
    assert result["stages"]["M1"]["stage"] == "train_rpn"
    assert json.loads(json.dumps(result)) == result


def test_summary_speaks_of_what_is_there(copied):
    for name in ("M1.safetensors", "P1.h5", "M1.json"):
        (copied / name).unlink()
    result = summary(open_tiny(copied), "voc07")
    assert [each["name"] for each in result["scores"]] == ["M5 (shared)"]
    assert list(result["recall"]) == ["P2"]
    assert "M1" not in result["stages"]


def test_summary_of_nothing(tmp_path):
    result = summary(open_tiny(tmp_path / "tiny"), "voc07")
    assert (result["scores"], result["recall"], result["stages"]) == ([], {}, {})
