import numpy as np
import pytest
from own_photographs import SIZE, save_image, write, yolo

from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset
from altopt.datasets.yolo import YoloDataset
from altopt.errors import DataError

NAMES = "names: [cat, dog]\n"


def ultralytics(root, yaml=f"train: images/train\nval: images/val\n{NAMES}", lines="0 0.5 0.5 0.25 0.5\n"):
    """images/SPLIT and labels/SPLIT, with a data.yaml."""
    yolo(root / "images" / "train", root / "labels" / "train", "ab", lines)
    yolo(root / "images" / "val", root / "labels" / "val", "c", lines)
    write(root / "data.yaml", yaml)
    return root


def roboflow(root, yaml=f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n{NAMES}"):
    """SPLIT/images and SPLIT/labels, with paths of another folder in data.yaml."""
    yolo(root / "train" / "images", root / "train" / "labels", "ab")
    yolo(root / "valid" / "images", root / "valid" / "labels", "c")
    write(root / "data.yaml", yaml)
    return root


def of_lines(root, lines, split="images/train", **options):
    return YoloDataset(ultralytics(root, lines=lines), (split,), **options)


def test_objects(tmp_path):
    dataset = of_lines(tmp_path, "1 0.5 0.5 0.25 0.5\n\n0 0.25 0.25 0.1 0.1\n")
    assert (dataset.ids, dataset.classes, dataset.category_ids) == (("a", "b"), ("cat", "dog"), (1, 2))
    objects = dataset.objects("a")
    assert objects.boxes == pytest.approx(np.array([[22.5, 10, 37.5, 30], [12, 8, 18, 12]]))
    assert objects.labels.tolist() == [1, 0]
    assert objects.counted.all()
    assert (dataset.size("a"), dataset.image("a").shape, dataset.coco_image_id("a")) == (SIZE, (40, 60, 3), "a")
    assert dataset.check() == []
    assert dataset.name == "YOLO train"


def test_polygons_become_their_box(tmp_path):
    dataset = of_lines(tmp_path, "0 0.5 0.25 0.75 0.5 0.25 0.75\n0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n")
    assert dataset.objects("a").boxes.tolist() == [[15, 10, 45, 30], pytest.approx([6, 4, 30, 20])]


def test_keypoints_are_passed_over(tmp_path):
    yaml = f"train: images/train\nkpt_shape: [2, 2]\n{NAMES}"
    root = ultralytics(tmp_path, yaml, "0 0.5 0.5 0.25 0.5 0.1 0.1 0.2 0.2\n")
    assert YoloDataset(root, ("data.yaml:train",)).objects("a").boxes.tolist() == [[22.5, 10, 37.5, 30]]


@pytest.mark.parametrize("label", ["", "\n \n", None])
def test_an_empty_or_missing_label_file_is_an_image_without_objects(tmp_path, label):
    root = ultralytics(tmp_path)
    path = root / "labels" / "train" / "a.txt"
    path.unlink() if label is None else path.write_text(label)
    dataset = YoloDataset(root, ("images/train",))
    assert (len(dataset.objects("a")), len(dataset.objects("b"))) == (0, 1)
    assert dataset.check() == []
    assert len(dataset.files()) == (4 if label is None else 5)


@pytest.mark.parametrize(("line", "cause"), [
    ("0 0.5 0.5 0.25", r"line 1: it has 4 columns"),
    ("0 0.5 0.5 0.25 0.5 0.9", r"line 1: it has 6 columns"),
    ("0", r"line 1: it has 1 columns"),
    ("0 0.5 0.5 0.25 0.5 0.9 0.9 0.9", r"line 1: it has 8 columns"),
    ("cat 0.5 0.5 0.25 0.5", r'line 1: "cat 0.5 0.5 0.25 0.5" must be a whole class number'),
    ("0.5 0.5 0.5 0.25 0.5", r"must be a whole class number"),
    ("0 nan 0.5 0.25 0.5", r"must be a whole class number"),
    ("0 0,5 0,5 0,25 0,5", r"must be a whole class number"),
    ("2 0.5 0.5 0.25 0.5", r"line 1 \(2\): class 2 is none of the 2 classes, 0 to 1"),
    ("-1 0.5 0.5 0.25 0.5", r"class -1 is none"),
    ("0 30 20 15 20", r"line 1 \(cat\): 30 is not between 0 and 1"),
    ("0 0.5 -0.1 0.25 0.5", r"-0.1 is not between 0 and 1"),
    ("0 0.5 0.5 0 0.5", r"has no area"),
    ("0 0.5 0.5 0.5 0.5 0.5 0.5", r"polygon has no area"),
    ("0 0.9 0.5 0.5 0.5", r"its box 39 10 69 30 leaves the image of 60 x 40"),
])
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, cause):
    dataset = of_lines(tmp_path, f"{line}\n0 0.5 0.5 0.25 0.5\n")
    for look in (dataset.check, lambda: dataset.objects("a")):
        with pytest.raises(DataError, match=rf"a\.txt, .*{cause}"):
            look()
    lenient = YoloDataset(tmp_path, ("images/train",), invalid="leave-out")
    assert lenient.objects("a").boxes.tolist() == [[22.5, 10, 37.5, 30]]
    assert [each.endswith("left out") for each in lenient.check()] == [True, True]


def test_rounding_may_push_a_box_out_by_a_pixel(tmp_path):
    dataset = of_lines(tmp_path, "0 0.5 0.5 1.0004 1.0\n")
    assert dataset.check() == []


@pytest.mark.parametrize("split", ["images/train", "images/train/", "data.yaml:train", "train.txt"])
def test_spellings_of_ultralytics(tmp_path, split):
    root = ultralytics(tmp_path)
    write(root / "train.txt", "./images/train/a.jpg\nimages/train/b.jpg\n")
    dataset = YoloDataset(root, (split,))
    assert [image_id.rpartition("/")[2] for image_id in dataset.ids] == ["a", "b"]
    assert dataset.look().objects == 2
    assert dataset.check() == []
    assert {"data.yaml", "a.txt", "b.jpg"} <= {path.name for path in dataset.files()}


@pytest.mark.parametrize("line", [
    "/home/someone/set/images/train/a.jpg", "C:\\set\\images\\train\\a.jpg", "../images/train/a.jpg",
    "data/images/train/a.jpg"])
def test_paths_of_other_machines(tmp_path, line):
    root = ultralytics(tmp_path)
    write(root / "train.txt", f"{line}\n", "utf-16")
    assert YoloDataset(root, ("train.txt",)).look().objects == 1


def test_roboflows_spelling(tmp_path):
    dataset = YoloDataset(roboflow(tmp_path), ("data.yaml:train",))
    assert dataset.ids == ("a", "b")
    assert dataset.check() == []
    assert YoloDataset(tmp_path, ("train/images",)).check() == []
    assert YoloDataset(tmp_path, ("train",)).name == YoloDataset(tmp_path, ("train/images",)).name == "YOLO train"
    assert YoloDataset(tmp_path, ("train",)).objects("a").labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"names .*/test/images, and nothing of that name lies below"):
        _ = YoloDataset(tmp_path, ("data.yaml:test",)).ids


@pytest.mark.parametrize("start", [".", "../set", "/datasets/set", "set"])
def test_path_of_the_yaml_file(tmp_path, start):
    root = ultralytics(tmp_path / "set", f"path: {start}\ntrain: images/train\nval: [images/val]\n{NAMES}")
    assert YoloDataset(root, ("data.yaml:train",)).ids == ("a", "b")
    assert YoloDataset(root, ("data.yaml:val",)).ids == ("c",)


def test_joined_splits_have_ids_of_their_own(tmp_path):
    dataset = YoloDataset(ultralytics(tmp_path), ("images/train", "images/val"))
    assert dataset.ids == ("images/train/a", "images/train/b", "images/val/c")
    assert dataset.objects("images/val/c").labels.tolist() == [0]
    assert dataset.name == "YOLO train+val"


def test_folders_in_folders_and_labels_elsewhere(tmp_path):
    yolo(tmp_path / "images" / "x", tmp_path / "labels" / "x", "a")
    yolo(tmp_path / "images" / "y", tmp_path / "labels" / "y", "a")
    write(tmp_path / "classes.txt", "cat\ndog\n")
    dataset = YoloDataset(tmp_path, ("images",))
    assert dataset.ids == ("x/a", "y/a")
    assert dataset.look().objects == 4
    yolo(tmp_path / "flat", tmp_path / "flat", "b")
    assert YoloDataset(tmp_path, ("flat",)).objects("b").labels.tolist() == [0, 1]


@pytest.mark.parametrize("names", [
    "names: [cat, dog]", "names: {0: cat, 1: dog}", "names:\n  '1': dog\n  '0': cat", "nc: 2\nnames:\n- cat\n- dog"])
def test_names_in_yaml(tmp_path, names):
    assert YoloDataset(ultralytics(tmp_path, names), ("images/train",)).classes == ("cat", "dog")


@pytest.mark.parametrize(("yaml", "cause"), [
    ("names: [no, yes]", "a name is False, which is no text in YAML: put it in quotes"),
    ("names: [cat, cat]", 'the name "cat" occurs twice'),
    ("names: [[cat]]", "is no text in YAML"),
    ("names: {0: cat, 2: dog}", "keys 0 to 1"),
    ("names: {a: cat}", "numbers of classes as keys"),
    ("names: 5", "must be a list"),
    ("nc: 3\nnames: [cat, dog]", "has nc 3 and 2 names"),
    ("[cat]", "must be a mapping"),
    ("names: [", "it is not YAML"),
    ("names: !!python/object/apply:os.system ['true']", "it is not YAML"),
    ('names: ["\\ud800"]', "YAML|Unicode"),
])
def test_a_yaml_file_that_names_no_classes_is_refused(tmp_path, yaml, cause):
    dataset = YoloDataset(ultralytics(tmp_path, yaml), ("images/train",))
    with pytest.raises(DataError, match=rf"data\.yaml: .*{cause}"):
        _ = dataset.classes
    assert [each.severity for each in dataset.look().findings] == ["problem"]


def test_nested_aliases_cost_nothing(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)]
    dataset = YoloDataset(ultralytics(tmp_path, "\n".join([*lines, "names: *a19"])), ("images/train",))
    with pytest.raises(DataError, match="no text in YAML"):
        _ = dataset.classes


def test_without_names_classes_are_numbers(tmp_path):
    yolo(tmp_path / "images" / "train", tmp_path / "labels" / "train", "a", "2 0.5 0.5 0.2 0.2\n")
    yolo(tmp_path / "images" / "val", tmp_path / "labels" / "val", "b", "3 0.5 0.5 0.2 0.2\n")
    config = DataConfig(format="yolo", train=("images/train",), test=("images/val",))
    train, test = (open_dataset(config, split, tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ("0", "1", "2")
    assert [text.endswith("classes are called by their numbers") for text in train.check()] == [True]
    assert [path.name for path in test.files()] == ["b.jpg", "b.txt", "a.txt"]
    with pytest.raises(DataError, match="class 3 is none of the 3 classes"):
        test.check()


def test_names_that_labelimg_leaves_among_the_labels(tmp_path):
    yolo(tmp_path / "train", tmp_path / "train", "a")
    yolo(tmp_path / "test", tmp_path / "test", "b")
    write(tmp_path / "train" / "classes.txt", "cat\ndog\n")
    config = DataConfig(format="yolo", train=("train",), test=("test",))
    for split in ("train", "test"):
        dataset = open_dataset(config, split, tmp_path)
        assert dataset.classes == ("cat", "dog")
        assert dataset.check() == []
        assert "classes.txt" in [path.name for path in dataset.files()]


def test_a_class_number_of_a_billion_takes_no_memory(tmp_path):
    yolo(tmp_path / "images", tmp_path / "labels", "a", "999999999 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n")
    dataset = YoloDataset(tmp_path, ("./",))
    assert dataset.classes == ("0", "1")
    with pytest.raises(DataError, match="class 999999999 is none"):
        dataset.check()


def test_classes_that_are_not_asked_for_are_left_out(tmp_path):
    dataset = of_lines(tmp_path, "0 0.5 0.5 0.25 0.5\n1 0.5 0.5 0.25 0.5\n", classes=("dog",))
    assert (dataset.classes, dataset.objects("a").labels.tolist()) == (("dog",), [0])
    assert [text.rpartition(": ")[2] for text in dataset.check()] == ["cat 2"]
    with pytest.raises(DataError, match=r'no class "bear": name some of its own, cat, dog'):
        _ = YoloDataset(tmp_path, ("images/train",), classes=("bear",)).classes


def test_labels_without_image_and_images_without_labels_are_named(tmp_path):
    root = ultralytics(tmp_path)
    write(root / "labels" / "train" / "lost.txt", "0 0.5 0.5 0.25 0.5\n")
    save_image(root / "more" / "x.jpg")
    assert ["1 label files have no image" in text for text in YoloDataset(root, ("images/train",)).check()] == [True]
    assert ["none of the 1 images has a label file" in text for text in YoloDataset(root, ("more",)).check()] == [True]


def test_splits_that_are_not_there_are_named(tmp_path):
    root = ultralytics(tmp_path)
    (root / "empty").mkdir()
    write(root / "none.txt", "\n")
    for split, cause in (("empty", "holds no image"), ("nowhere", "holds no image"), ("none.txt", "lists no image"),
                         ("data.yaml:test", r'has no split "test": choose one of train, val'),
                         ("no.txt", "cannot be read"), ("no.yaml:train", "cannot be read"), ("../x", "leads out")):
        with pytest.raises(DataError, match=cause):
            _ = YoloDataset(root, (split,)).ids


def test_nothing_leads_out_of_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    ultralytics(root)
    save_image(outside / "secret.jpg")
    write(outside / "secret.txt", "password\n")
    (root / "images" / "train" / "z.jpg").symlink_to(outside / "secret.jpg")
    (root / "labels" / "train" / "a.txt").unlink()
    (root / "labels" / "train" / "a.txt").symlink_to(outside / "secret.txt")
    dataset = YoloDataset(root, ("images/train",))
    for look in (lambda: dataset.image("z"), lambda: dataset.objects("a"), dataset.files, dataset.check):
        with pytest.raises(DataError, match="leads out of the data root"):
            look()
    (root / "images" / "far").symlink_to(outside)
    write(root / "list.txt", "../outside/secret.jpg\n")
    with pytest.raises(DataError, match="nothing of that name"):
        _ = YoloDataset(root, ("list.txt",)).ids


def test_exif_turns_images_and_sizes_alike(tmp_path):
    root = ultralytics(tmp_path, lines="0 0.5 0.25 0.5 0.5\n")
    save_image(root / "images" / "train" / "a.jpg", orientation=6)
    with pytest.raises(DataError, match=r"a\.jpg has EXIF orientation 6"):
        YoloDataset(root, ("images/train",)).check()
    dataset = YoloDataset(root, ("images/train",), exif="apply")
    assert dataset.check() == []
    assert (dataset.size("a"), dataset.image("a").shape) == ((40, 60), (60, 40, 3))
    assert dataset.objects("a").boxes.tolist() == [[10, 0, 30, 30]]
    assert YoloDataset(root, ("images/train",), exif="ignore").objects("a").boxes.tolist() == [[15, 0, 45, 20]]
