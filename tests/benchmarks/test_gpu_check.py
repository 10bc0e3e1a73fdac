import json
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Part, parts, run_parts

ROOT = Path(__file__).parents[2]
SLEEP = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


@pytest.fixture(autouse=True)
def little_grace(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)


def test_a_part_that_fails_or_hangs_does_not_keep_others_from_running(tmp_path, capsys):
    began = time.monotonic()
    outcomes = run_parts([Part("fails", 9, ("-c", "print('so far'); raise SystemExit(3)")),
                          Part("hangs", 0.5, ("-c", SLEEP)), Part("works", 9, ("-c", "print('well')"))], tmp_path)
    assert time.monotonic() - began < 30
    assert [each.code for each in outcomes] == [3, None, 0]
    assert (tmp_path / "fails.txt").read_text() == "so far\n"
    assert (tmp_path / "works.txt").read_text() == "well\n"
    assert [each["code"] for each in json.loads((tmp_path / "summary.json").read_text())] == [3, None, 0]
    assert "hangs: stopped at its limit" in (tmp_path / "summary.md").read_text()
    assert "works: exit code 0" in capsys.readouterr().out


def test_a_part_that_ignores_sigterm_is_killed(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    (outcome,) = run_parts([Part("stubborn", 0.5, ("-c", stubborn))], tmp_path)
    assert outcome.code is None
    assert outcome.seconds < 20


def test_without_time_left_nothing_begins(tmp_path):
    outcomes = run_parts([Part("late", 9, ("-c", "print(1)"))], tmp_path, seconds=0.4)
    assert [(each.code, each.seconds) for each in outcomes] == [(None, 0.0)]
    assert not (tmp_path / "late.txt").exists()


def test_parts_are_what_a_gpu_can_show_in_their_order(tmp_path):
    todo = parts(tmp_path, Path("data"))
    assert [each.name for each in todo] == \
        ["facts", "tests", "demo", "bench-float32", "bench-tf32", "bench-bfloat16", "photographs"]
    assert all(each.arguments[0] in ("-c", "-m") for each in todo)  # this interpreter, from any folder
    assert [each.name for each in parts(tmp_path, None)][-1] == "bench-bfloat16"


def test_the_bench_s_options_are_known(tmp_path):
    from benchmarks.bench.__main__ import bench

    for part in parts(tmp_path, None):
        if part.name.startswith("bench"):
            context = bench.make_context("bench", list(part.arguments[2:]))
            assert context.params["save"] == tmp_path / f"{part.name}.json"


def test_parts_find_the_program_from_any_folder(tmp_path, monkeypatch, capsys):
    one = Part("one", 9, ("-c", "import altopt; print(altopt.__path__)"))
    monkeypatch.setattr(gpu_check, "parts", lambda *_: [one])
    assert gpu_check.main(["--out", str(tmp_path / "new")]) == 0
    assert str(ROOT / "altopt") in (tmp_path / "new" / "one.txt").read_text()
    assert "one: exit code 0" in capsys.readouterr().out
