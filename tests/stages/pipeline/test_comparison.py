"""Comparing schemes: what is counted, what one run takes over from another, and what is written."""

import csv
import io
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import Reports, make_all, open_tiny

from altopt.errors import DivergedError, UsageError
from cache.records import write_record
from stages import SCHEMES
from stages.console.reporting import comparison_table
from stages.pipeline import comparison as module
from stages.pipeline.comparison import (
    HEADINGS,
    SLIDES,
    Comparison,
    Outcome,
    Variant,
    chosen_variants,
    given_artifacts,
    outcome,
    outcomes,
    printed,
    rows,
    write,
)
from stages.shared.events import Reason
from stages.shared.step import Runtime

ONE = Outcome("rcnn", "rcnn", 1, map=0.5, training=100.0, pretraining=7.0, proposals=40.0, fine_tuning=60.0,
              features=30.0, classifiers=10.0, test_seconds=0.25, bytes=3 * 2**20, iterations=300)


def test_every_scheme_of_the_slides_is_one():
    assert set(SLIDES) <= set(SCHEMES)


def test_row_is_the_mean_over_the_seeds_with_the_deviation_of_the_sample():
    row, = rows([ONE, replace(ONE, seed=2, map=0.6, training=200.0), replace(ONE, seed=3, map=0.7, training=0.0)])
    assert (row["name"], row["scheme"], row["seeds"]) == ("rcnn", "rcnn", 3)
    assert row["map"] == pytest.approx(0.6)
    assert row["map_sd"] == pytest.approx(0.1)
    assert row["training"] == pytest.approx(100.0)
    assert (row["bytes"], row["iterations"], row["test_seconds"]) == (3 * 2**20, 300, 0.25)
    assert row["slides"]["hours"] == 84


def test_rows_keep_the_order_in_which_schemes_came():
    results = [replace(ONE, name=name, seed=seed) for seed in (1, 2) for name in ("spp-net", "rcnn")]
    assert [(row["name"], row["seeds"]) for row in rows(results)] == [("spp-net", 2), ("rcnn", 2)]


def test_one_seed_has_no_deviation_and_a_score_may_be_undefined():
    row, = rows([ONE])
    assert (row["map"], row["map_sd"]) == (0.5, None)
    row, = rows([replace(ONE, map=None)])
    assert (row["map"], row["map_sd"]) == (None, None)
    row, = rows([replace(ONE, map=None), ONE])
    assert (row["map"], row["map_sd"]) == (0.5, None)
    assert rows([]) == []


def test_scheme_that_the_slides_do_not_have():
    row, = rows([replace(ONE, name="mine")])
    assert set(row["slides"].values()) == {None}
    assert len(printed([row])) == 1


def test_cells_are_measured_ones_then_those_of_the_slides():
    measured, published = printed(rows([ONE, replace(ONE, seed=2, map=0.6)]))
    assert measured == ["rcnn", "2", "0.550 ± 0.071", "1 min 40 s", "1 min 00 s", "30.0 s", "10.0 s", "40.0 s", "0.250",
                        "3 MiB", "300"]
    assert published == ["- slides", "", "0.660", "84 h", "18 h", "63 h", "3 h", "-", "47", "-", "-"]
    assert printed(rows([replace(ONE, map=None, features=0.0)]))[0][2:6] == ["-", "1 min 40 s", "1 min 00 s", "-"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_is_written_is_well_formed(tmp_path, seeds):
    results = [replace(ONE, name=scheme, scheme=scheme, seed=seed + 1) for seed in range(seeds) for scheme in SLIDES]
    write(tmp_path, results)
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert [row["name"] for row in kept["rows"]] == list(SLIDES)
    assert [Outcome(**each) for each in kept["runs"]] == results
    table = list(csv.DictReader(io.StringIO((tmp_path / "compare.csv").read_text())))
    assert (table[0]["name"], table[0]["seeds"], table[0]["slides_map"]) == ("rcnn", str(seeds), "66.0")
    assert all(None not in row and None not in row.values() for row in table)
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert {line.count("|") for line in lines} == {len(HEADINGS) + 1}
    assert len(lines) == 2 + 2 * len(SLIDES) - 1  # exact joint is not on the slides


def test_table_fits_into_160_columns_and_never_cuts_a_name():
    long = replace(ONE, training=45_000.0, fine_tuning=1400.0, features=1400.0, classifiers=1400.0, proposals=45_000.0,
                   bytes=200 * 2**30, iterations=240_000, test_seconds=47.123)
    table = rows([replace(long, name=scheme, seed=seed) for scheme in SLIDES for seed in (1, 2)])
    for width, folded in ((160, False), (80, True)):
        file = io.StringIO()
        console = Console(file=file, width=width)
        console.print(comparison_table(HEADINGS, printed(table)))
        lines = file.getvalue().splitlines()
        assert all(any(line.startswith(f"{scheme} ") for line in lines) for scheme in SLIDES)
        assert (len(lines) > 1 + len(printed(table))) == folded


def test_schemes_by_name():
    assert chosen_variants(None) == [Variant(name, name) for name in SLIDES]
    assert chosen_variants("spp-net, rcnn,spp-net") == [Variant("spp-net", "spp-net"), Variant("rcnn", "rcnn")]


@pytest.mark.parametrize(("text", "message"), [
    ("", "no scheme ''"), ("rcnn,", "no scheme ''"), ("fastrcnn", r"did you mean 'fast-rcnn'\?")])
def test_schemes_that_are_none(text, message):
    with pytest.raises(UsageError, match=message):
        chosen_variants(text)


def test_given_artifacts_are_those_that_every_scheme_makes_from_nothing():
    assert given_artifacts(["M0=a=b.pth", "T0=t.h5"], ["fast-rcnn"]) == {"M0": Path("a=b.pth"), "T0": Path("t.h5")}


@pytest.mark.parametrize(("word", "schemes", "message"), [
    ("M0", ["rcnn"], "--from M0: name the file to take, --from M0=FILE"),
    ("M0=", ["rcnn"], "--from M0=: name the file to take"),
    ("P9=x.h5", ["rcnn"], r"there is no 'P9' to take.*: choose one of M0, P0, T0"),
    ("M1=x.safetensors", ["rcnn", "alternating"], "there is no 'M1' to take"),
    ("P0=x.h5", ["alternating"], r"there is no 'P0' to take.*: choose one of M0$"),
])
def test_given_artifacts_that_cannot_be(word, schemes, message):
    with pytest.raises(UsageError, match=message):
        given_artifacts([word], schemes)


def compared(folder, names, seeds=(1,), report=None, **options):
    runtime = Runtime(device="cpu", workers=0, snapshot_seconds=1000, report=report or Reports())
    variants = [each if isinstance(each, Variant) else Variant(each, each) for each in names]
    return list(outcomes(Comparison(folder / "all", str(folder / "tiny.toml"), variants, seeds, **options), runtime,
                         working_in))


@contextmanager
def working_in(run):
    run.folder.mkdir(parents=True, exist_ok=True)
    yield


def test_outcome_counts_what_the_records_say(copied):
    run = open_tiny(copied)
    seconds = {name: 2.0**number for number, name in enumerate(("M0", "M1", "P1", "M2", "M3", "P2", "M4", "M5"))}
    for name, value in seconds.items():
        write_record(copied / f"{name}.json", replace(run.record(name), seconds=value))
    result = outcome(run, Variant("alternating", "alternating"), 3)
    assert result.pretraining == seconds["M0"]
    assert result.proposals == seconds["P1"] + seconds["P2"]
    assert result.training == sum(seconds.values()) - seconds["M0"]
    assert (result.features, result.classifiers) == (0, 0)
    assert result.iterations == 16
    assert result.bytes == sum(run.record(name).size for name in seconds)
    assert result.map is not None


def test_joint_schemes_take_over_m0_and_seeds_do_not(workplace):
    reports = Reports()
    results = compared(workplace, ["approximate-joint", "exact-joint"], (1, 2), reports)
    assert [(each.scheme, each.seed) for each in results] == [
        ("approximate-joint", 1), ("exact-joint", 1), ("approximate-joint", 2), ("exact-joint", 2)]
    taken = [event for event in reports.of(Reason) if "taken over" in event.text]
    assert [(event.artifact, Path(event.text.split()[-1]).name) for event in taken] == [
        ("M0", "approximate-joint-1"), ("M0", "approximate-joint-2")]
    again = Reports()
    assert compared(workplace, ["approximate-joint", "exact-joint"], (1, 2), again) == results
    assert {event.kind for event in again.events} == {"note"}


def test_variants_of_one_scheme_share_what_their_settings_do_not_touch(workplace):
    reports = Reports()
    short = Variant("short", "approximate-joint", ("train_approximate_joint.iterations=1",))
    results = compared(workplace, ["approximate-joint", short], report=reports)
    assert [(each.name, each.scheme, each.iterations) for each in results] == [
        ("approximate-joint", "approximate-joint", results[0].iterations), ("short", "approximate-joint", 1)]
    assert results[0].iterations > 1
    taken = [event.artifact for event in reports.of(Reason) if "taken over" in event.text]
    assert taken == ["M0"]
    first, second = rows(results)
    assert first["slides"]["map"] == SLIDES["approximate-joint"].map
    assert set(second["slides"].values()) == {None}


def test_run_that_diverges_is_left_out_and_the_others_go_on(workplace, monkeypatch):
    original = module.outcome

    def diverging(run, variant, seed, others):
        if (variant.scheme, seed) == ("approximate-joint", 1):
            raise DivergedError("iteration 3: cls = nan")
        return original(run, variant, seed, others)

    monkeypatch.setattr(module, "outcome", diverging)
    reports = Reports()
    results = compared(workplace, ["approximate-joint", "exact-joint"], (1,), reports)
    assert [each.scheme for each in results] == ["exact-joint"]
    assert "approximate-joint, seed 1 diverged: iteration 3: cls = nan" in reports.texts()


def test_given_m0_is_taken_even_where_another_was_made(workplace, finished):
    compared(workplace, ["approximate-joint"])
    reports = Reports()
    compared(workplace, ["approximate-joint"], report=reports, given=[f"M0={finished / 'M0.safetensors'}"])
    assert [event.artifact for event in reports.events if event.kind == "finished"] == ["M1", "D1"]


def test_given_m0_is_no_reason_to_make_anything_twice(workplace, finished):
    given = [f"M0={finished / 'M0.safetensors'}"]
    results = compared(workplace, ["approximate-joint"], given=given)
    assert results[0].pretraining == 0
    reports = Reports()
    assert compared(workplace, ["approximate-joint"], report=reports, given=given) == results
    assert {event.kind for event in reports.events} == {"note"}


@pytest.fixture
def pair(finished, tmp_path):
    """A run with M0, and an empty one of the same recipe."""
    one, other = open_tiny(tmp_path / "one"), open_tiny(tmp_path / "two")
    one.bring_up_to_date(one.recipe.steps[:2])
    return one, other


def take_m0(run, other, index=0):
    return run.reuse(run.recipe.steps[index], other)


def test_take_over_links_and_is_done(pair):
    one, two = pair
    assert take_m0(two, one)
    assert two.path("M0").samefile(one.path("M0"))
    assert two.verdict(two.recipe.steps[0]).state == "done"
    assert two.record("M0") == one.record("M0")
    assert take_m0(two, one, 1)
    assert two.verdict(two.recipe.steps[1]).state == "done"
    assert make_all(two)[0] == "P1"
    assert one.verdict(one.recipe.steps[1]).state == "done"


def test_take_over_of_nothing(pair):
    one, two = pair
    assert not take_m0(two, one, 2)  # P1 was not made
    assert not take_m0(two, one, 1)  # M1 was, but M0 is not here yet
    one.path("M0").unlink()
    assert not take_m0(two, one)  # a record alone
    assert not list(two.folder.glob("M*"))


@pytest.mark.parametrize("change", [
    {"stage": "load_imagenet_weights"}, {"version": 99}, {"inputs": {"M9": "0" * 64}}, {"data": "0" * 64},
    {"sha256": "0" * 64}, {"given": "--from M0=x"},
])
def test_take_over_only_of_the_same(pair, change):
    one, two = pair
    write_record(one.folder / "M0.json", replace(one.record("M0"), **change))
    assert not take_m0(two, one)
    assert not two.path("M0").exists()


def test_take_over_only_with_equal_settings(pair):
    one, two = pair
    other = open_tiny(two.folder, "pretrain_on_crops.lr=0.5")
    assert not take_m0(other, one)


def test_take_over_only_from_equal_inputs(pair, tmp_path):
    one, _ = pair
    other = open_tiny(tmp_path / "three", "pretrain_on_crops.lr=0.5")
    other.bring_up_to_date(other.recipe.steps[:1])
    assert not take_m0(other, one, 1)


def test_take_over_not_of_what_was_changed_by_hand(pair):
    one, two = pair
    content = one.path("M0").read_bytes()
    one.path("M0").unlink()
    one.path("M0").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not take_m0(two, one)
