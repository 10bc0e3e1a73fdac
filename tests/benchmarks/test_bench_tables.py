import pytest

from altopt.errors import ArtifactError
from benchmarks.bench.schedule import Figures, ratios, schedule
from benchmarks.bench.stopwatch import PARTS
from benchmarks.bench.tables import BEGIN, END, insert, markdown_of


def row(name, seconds, **others):
    return {"name": name, "precision": "float32", "store": False, "compiled": False, "images": 1,
            "seconds": seconds, "least": seconds / 2, "greatest": seconds * 2, "processor_seconds": seconds,
            "steps": 3, "parts": dict.fromkeys(PARTS, 0.1), "shares": dict.fromkeys(PARTS, 0.1),
            "held_bytes": 2**30, "peak_bytes": 3 * 2**29, **others}


def report(*results):
    return {
        "command": "python -m benchmarks.bench", "settings": {"clock": "seconds", "rounds": 3},
        "results": list(results),
        "machine": {"processor": "Abacus", "threads": 1, "cores": 2, "gpus": [], "torch": "2.11", "torchvision": "0.26",
                    "bf16_flags": [], "load_average": 0.5},
    }


def result(network, *rows):
    figures = Figures(rows, "seconds")
    return {"network": network, "size": "600x800", "device": "cpu", "contenders": list(rows),
            "ratios": {"float32": ratios(figures, "float32")},
            "schedule": {"float32": schedule(figures, "float32")}}


def test_tables_have_a_column_for_each_network_and_a_dash_for_what_is_missing():
    text = markdown_of(report(
        result("vgg16", row("train_rpn", 4.0), row("train_rpn_frozen_conv", 3.0),
               row("train_rpn_frozen_conv", 0.25, store=True)),
        result("small", row("train_rpn", 0.5, peak_bytes=None))))
    lines = text.splitlines()
    assert "| step | vgg16 600x800 cpu | small 600x800 cpu |" in lines
    assert "| `train_rpn` | 4 (2 to 8); 1.50 GiB | 0.5 (0.25 to 1) |" in lines
    assert "| `train_rpn_frozen_conv`, store | 0.25 (0.125 to 0.5); 1.50 GiB | - |" in lines
    assert "| stage 4, a step: store against none | 12.00 | - |" in lines
    assert f"| `train_rpn` |{' 10 |' * len(PARTS)}" in lines
    assert "neither AVX512-BF16 nor AMX" in text
    assert "None" not in text
    assert "whole schedule" not in text  # of which nothing is known


def test_the_table_has_the_clock_that_was_asked_for():
    made = report(result("small", row("train_rpn", 4.0) | {"processor_seconds": 0.5}))
    made["settings"]["clock"] = "processor_seconds"
    text = markdown_of(made)
    assert "| `train_rpn` | 0.5; 1.50 GiB |" in text.splitlines()
    assert "Processor time" in text


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before é\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    insert(path, "new")
    assert path.read_text(encoding="utf-8") == f"before é\n{BEGIN}\nnew\n{END}\nafter\n"
    insert(path, "newer")
    assert path.read_text(encoding="utf-8") == f"before é\n{BEGIN}\nnewer\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_document_without_a_place_is_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ArtifactError, match="has no place for the tables"):
        insert(path, "new")
    assert path.read_text() == text
    with pytest.raises(ArtifactError, match="cannot be read"):
        insert(tmp_path / "missing.md", "new")
