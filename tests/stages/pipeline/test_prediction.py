"""``altopt predict``: what it reads, what it writes, and what it leaves alone."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import open_tiny

from altopt.datasets.opening import open_dataset
from altopt.drawing.boxes import class_colour
from stages.pipeline.prediction import find_images

LOW = ("--run", "tiny", "--score", "0.05")  # a network of four iterations is sure of nothing


@pytest.fixture
def photos(copied):
    """Four images of the run's test split in photos/, two of them below it."""
    dataset = open_dataset(open_tiny(copied).recipe.data, "test", None)
    folder = copied.parents[1] / "photos"
    (folder / "below").mkdir(parents=True)
    for name, id in zip(("a.png", "b.jpg", "below/a.png", "below/c.webp"), dataset.ids, strict=True):
        Image.fromarray(dataset.image(id)).save(folder / name)
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def results(folder="predictions"):
    return json.loads(Path(folder, "results.json").read_text())


def test_a_folder(altopt, photos):
    answer = altopt("predict", "M5", "photos", *LOW)
    assert (answer.code, answer.err.splitlines()[0]) == (0, "predict 4 images from M5")
    names = ["a.png", "b.jpg", "below/a.png", "below/c.webp"]
    assert files("predictions") == [*names, "predict.json", "results.json"]
    lines = answer.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [*names, "drawn in predictions"]
    held = results()
    assert {each["image_id"] for each in held} == set(names)
    count = sum(each["image_id"] == "a.png" for each in held)
    assert sum(int(word.split()[0]) for word in lines[0].partition(": ")[2].split(", ")) == count > 0


def test_what_is_found_is_drawn_where_it_is(altopt, photos):
    assert altopt("predict", "M5", photos / "a.png", *LOW, "--set", "detect.per_image=1").code == 0
    with Image.open("predictions/a.png") as image, Image.open(photos / "a.png") as before:
        drawn, original = np.asarray(image), np.asarray(before)
    assert drawn.shape == original.shape
    (best,) = results()
    x, y, _, height = best["bbox"]
    colour = class_colour(best["category_id"] - 1)
    edge = drawn[round(y) + round(height) // 2, round(x)]
    assert tuple(edge) == colour
    Path("plain").mkdir()
    assert altopt("predict", "M5", photos / "a.png", "--run", "tiny", "--score", "1", "--out", "plain").code == 0
    with Image.open("plain/a.png") as image:
        assert (np.asarray(image) == original).all()
    assert results("plain") == []


def test_json_on_stdout_is_the_file(altopt, photos):
    answer = altopt("predict", "M1+M2", "photos", *LOW, "--json")
    assert json.loads(answer.out) == results()


def test_csv_and_yolo_hold_the_same(altopt, photos):
    command = ("predict", "M5", "photos", *LOW, "--set", "detect.per_image=3", "--csv", "--yolo")
    assert altopt(*command).code == 0
    names = ["a.txt", "b.txt", "below/a.txt", "below/c.txt"]
    assert files("predictions/labels") == names
    with Path("predictions/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results()) == 12
    for row, each in zip(rows, results(), strict=True):
        x, y, width, height = each["bbox"]
        assert (row["image"], row["class"]) == (each["image_id"], each["category"])
        np.testing.assert_allclose([float(row[key]) for key in ("score", "x1", "y1", "x2", "y2")],
                                   [each["score"], x, y, x + width, y + height], atol=0.006)
    classes = Path("predictions/classes.txt").read_text().split()
    lines = [line.split() for line in Path("predictions/labels/b.txt").read_text().splitlines()]
    expected = [each for each in results() if each["image_id"] == "b.jpg"]
    for line, each in zip(lines, expected, strict=True):
        x, y, width, height = each["bbox"]
        assert classes[int(line[0])] == each["category"]
        np.testing.assert_allclose([float(value) for value in line[1:]],
                                   [(x + width / 2) / 96, (y + height / 2) / 80, width / 96, height / 80], atol=1e-5)


def test_nothing_found_is_an_answer(altopt, photos):
    answer = altopt("predict", "M5", "photos", "--run", "tiny", "--score", "1", "--csv", "--yolo", "--json",
                    "--out", "p")
    assert (answer.code, json.loads(answer.out)) == (0, [])
    assert Path("p/results.csv").read_text() == "image,class,score,x1,y1,x2,y2\n"
    assert Path("p/labels/a.txt").read_text() == ""


def test_bad_images_are_named_and_the_rest_goes_on(altopt, photos):
    (photos / "bad.jpg").write_bytes(b"\xff\xd8 no image")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:900])
    Image.fromarray(np.full((40, 40), 999, np.uint16)).save(photos / "deep.png")
    Image.new("RGB", (4000, 2)).save(photos / "thin.png")
    answer = altopt("predict", "M5", "photos", *LOW, "--json")
    assert answer.code == 3
    assert {each["image_id"] for each in json.loads(answer.out)} == {"a.png", "b.jpg", "below/a.png", "below/c.webp"}
    warned = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    expected = ("bad.jpg is not a JPEG, PNG", "cut.png cannot be read", "deep.png has more than 8 bits",
                "thin.png has 4000 x 2 pixels, too narrow")
    for line, words in zip(warned, expected, strict=True):
        assert line.startswith("warning: photos/")
        assert words in line
    assert answer.err.splitlines()[-1].startswith("altopt: 4 of 8 images could not be used")
    assert not Path("predictions/bad.jpg").exists()


def test_all_images_bad(altopt, copied):
    Path("bad.jpg").write_text("no image")
    answer = altopt("predict", "M5", "bad.jpg", *LOW)
    assert (answer.code, answer.out) == (3, "drawn in predictions\n")
    assert results() == []


# What can be written in each format.
MODES = {"jpg": ("1", "L", "CMYK"), "JPEG": ("L",), "png": ("1", "L", "LA", "P", "RGBA"),
         "bmp": ("1", "L", "P", "RGBA"), "webp": ("L", "LA", "P", "RGBA", "CMYK"),
         "tif": ("1", "L", "LA", "P", "RGBA", "CMYK"), "TIFF": ("CMYK",)}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_every_kind_of_image_is_drawn_in_its_format(copied, photos, suffix, mode):
    from stages.pipeline.prediction import predict
    from stages.shared.step import Runtime

    path = Path(f"image.{suffix}")
    with Image.open(photos / "a.png") as image:
        image.convert(mode).save(path)
    made = predict("M5", [path], run="tiny", sets=[], out=Path("out"), score=0.05, as_csv=False, as_yolo=False,
                   runtime=Runtime(device="cpu"))
    assert made.unusable == {}
    with Image.open(path) as before, Image.open(Path("out") / path) as after:
        assert (after.format, after.size, after.mode) == (before.format, before.size, "RGB")


def test_exif_is_applied_to_what_is_drawn(altopt, photos):
    exif = Image.Exif()
    exif[0x0112] = 8
    with Image.open(photos / "a.png") as image:
        image.rotate(-90, expand=True).save("turned.png", exif=exif)
        image.save("upright.png")
    assert altopt("predict", "M5", "turned.png", "upright.png", *LOW).code == 0
    with Image.open("predictions/turned.png") as turned, Image.open("predictions/upright.png") as upright:
        assert turned.getexif().get(0x0112) is None
        assert (np.asarray(turned) == np.asarray(upright)).all()
    found = results()
    boxes = [[each["bbox"] for each in found if each["image_id"] == f"{name}.png"] for name in ("turned", "upright")]
    assert boxes[0] == boxes[1] != []


def test_lists_start_from_their_own_folder(altopt, photos):
    absolute = photos / "b.jpg"
    (photos / "list.txt").write_text(f"below/c.webp\n\n  a.png\nmissing.jpg\n{absolute}\n")
    answer = altopt("predict", "M5", "photos/list.txt", *LOW)
    assert answer.code == 3
    assert "warning: photos/missing.jpg is missing" in answer.err
    assert "1 of 4 images" in answer.err
    assert [line.split(":")[0] for line in answer.out.splitlines()[:-1]] == ["below/c.webp", "a.png", "b.jpg"]


def test_equal_names_do_not_collide(altopt, photos):
    assert altopt("predict", "M5", photos / "a.png", photos / "below" / "a.png", photos / "a.png", *LOW).code == 0
    assert files("predictions") == ["a.png", "below/a.png", "predict.json", "results.json"]


def test_names_start_from_the_folder_that_holds_all(photos):
    assert list(find_images([photos / "below" / "a.png"])) == ["a.png"]
    assert list(find_images([photos / "below"])) == ["a.png", "c.webp"]
    assert list(find_images([photos / "below", photos / "b.jpg"])) == ["below/a.png", "below/c.webp", "b.jpg"]
    os.chdir(photos / "below")
    assert list(find_images([Path("../a.png"), Path("c.webp")])) == ["a.png", "below/c.webp"]


def test_running_again_writes_over_its_own_only(altopt, photos):
    command = ("predict", "M5", "photos", *LOW, "--out", "photos/out")
    assert altopt(*command).code == 0
    first = {name: Path("photos/out", name).read_bytes() for name in files("photos/out")}
    assert altopt(*command).code == 0  # and what it has drawn is no image to detect on
    assert {name: Path("photos/out", name).read_bytes() for name in files("photos/out")} == first
    Image.new("RGB", (50, 50)).save(photos / "mine.png")
    shutil.copy(photos / "mine.png", photos / "out" / "mine.png")
    answer = altopt(*command)
    assert answer.code == 2
    assert "photos/out/mine.png is there and was not written by altopt predict: give another folder" in answer.err
    assert (photos / "out" / "mine.png").read_bytes() == (photos / "mine.png").read_bytes()
    assert {name: Path("photos/out", name).read_bytes() for name in first} == first


@pytest.mark.parametrize("name", ["results.json", "predict.json", "a.png"])
def test_what_is_another_programs_stays(altopt, photos, name):
    Path("mine").mkdir()
    Path("mine", name).write_text("{}")
    answer = altopt("predict", "M5", "photos", *LOW, "--out", "mine")
    assert (answer.code, answer.out) == (2, "")
    assert f"mine/{name} is there" in answer.err
    assert (files("mine"), Path("mine", name).read_text()) == ([name], "{}")


def test_the_images_own_folder_is_safe(altopt, photos):
    before = {name: (photos / name).read_bytes() for name in files(photos)}
    assert altopt("predict", "M5", "photos", *LOW, "--out", "photos").code == 2
    assert {name: (photos / name).read_bytes() for name in files(photos)} == before


def test_nothing_is_written_beside_the_network_or_the_images(altopt, photos, copied):
    for folder in (copied, photos, photos / "below"):
        folder.chmod(0o555)
    before = (files(copied), files(photos))
    try:
        assert altopt("predict", "M5", "photos", *LOW).code == 0
        assert (files(copied), files(photos)) == before
    finally:
        for folder in (copied, photos, photos / "below"):
            folder.chmod(0o755)


def test_a_held_run_is_no_hindrance(altopt, photos, copied):
    from cache.lock import run_lock

    with run_lock(copied):
        assert altopt("predict", "M5", "photos", *LOW).code == 0


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["M5", "empty"], 3, "empty holds no images"), (["M5", "empty.txt"], 3, "empty.txt holds no images"),
    (["M5", "photos/a.png", "empty"], 3, "empty holds no images"),
    (["M5", "a.bin"], 3, "a.bin is not a text in UTF-8"),
    (["M5", "missing.jpg"], 2, "'missing.jpg' does not exist"),
    (["M5"], 2, "Missing argument"), (["M1", "photos"], 4, "M1.safetensors does not hold fc layers or a head"),
    (["weights.pth", "photos"], 2, "'weights.pth' is not a network of the run tiny"),
    (["M5", "photos", "--score", "0.01"], 2, "--score 0.01 is below detect.score, 0.05"),
    (["M5", "photos", "--score", "nan"], 2, "--score nan is no score"),
    (["M5", "photos", "--score", "2"], 2, "Invalid value for '--score'"),
    (["M5", "photos", "--set", "train_rpn.lr=1"], 2, "these settings alone"),
    (["M5", "photos", "--yolo"], 2, "would share labels/"), (["M5", "photos", "--out", "a.bin"], 2, "'--out'"),
    (["M5", "photos", "--device", "nowhere"], 2, "--device nowhere"),
    (["M5", "photos", "--out", "a.bin/out"], 4, "a.bin/out"),
])
def test_what_cannot_be_predicted(altopt, photos, arguments, code, words):
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n")
    Path("a.bin").write_bytes(b"GIF89a\xff\x00")
    Path("weights.pth").write_bytes(b"")
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes())
    answer = altopt("predict", "--run", "tiny", *arguments)
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err
    assert not Path("predictions").exists()


@pytest.mark.parametrize("workers", ["0", "3"])
def test_readers_change_nothing(altopt, photos, workers):
    answer = altopt("predict", "M5", "photos", *LOW, "--json")
    assert altopt("predict", "M5", "photos", *LOW, "--json", "--workers", workers).out == answer.out


def test_a_name_that_cannot_be_written_down(altopt, photos):
    for name in (b"photos/\xff.jpg", b"photos/a\nb.jpg"):
        Path(os.fsdecode(name)).write_bytes(b"")
    answer = altopt("predict", "M5", "photos", *LOW)
    assert answer.code == 3
    assert answer.err.count("cannot be written down: rename it") == 2
    assert files("predictions")


def test_a_screenshots_narrow_space_is_no_hindrance(altopt, photos):
    (photos / "a.png").rename(photos / "at 3.04\u202fPM.png")
    answer = altopt("predict", "M5", "photos", *LOW)
    assert answer.code == 0
    assert Path("predictions/at 3.04\u202fPM.png").is_file()
