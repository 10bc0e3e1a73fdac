import json

import pytest

ROWS = ["conv1", "conv2", "conv3", "conv4", "conv5", "all"] * 2


def test_probe_prints_a_row_for_each_block_and_one_for_all(altopt, copied):
    result = json.loads(altopt("probe", "--run", "tiny", "--images", "3", "--json").out)
    assert result["network"] == "M5"
    assert len(set(result["images"])) == 3
    assert [row["block"] for row in result["rows"]] == ROWS
    assert all(-1 <= row["cosine"] <= 1 and row["norm_ratio"] > 0 for row in result["rows"])
    assert any(row["cosine"] < 1 - 1e-6 for row in result["rows"])
    table = altopt("probe", "M5", "--run", "tiny", "--images", "3").out
    lines = [line.split() for line in table.splitlines()]
    for row in result["rows"]:
        losses = ", ".join(row["losses"]).split()
        assert [*losses, row["block"], f"{row['cosine']:.3f}", f"{row['norm_ratio']:.3f}"] in lines


def test_probe_leaves_the_run_as_it_was(altopt, copied):
    def content():
        return {path.name: path.read_bytes() for path in copied.glob("[!.]*")}

    before = content()
    assert altopt("probe", "M5", "--run", "tiny", "--images", "1").code == 0
    assert content() == before


def test_more_images_than_there_are_mean_all(altopt, copied):
    result = json.loads(altopt("probe", "--run", "tiny", "--images", "100", "--json").out)
    assert result["images"] == [f"train-0000{k}" for k in range(6)]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["M2"], 4, "M2.safetensors has no rpn layers"), (["M1"], 4, "M1.safetensors has no"),
    (["P1"], 2, "P1 is not a network: choose among M0, M1, M2, M3, M4, M5"), (["M9"], 2, "no stage 'M9'"),
])
def test_what_cannot_be_probed(altopt, copied, arguments, code, words):
    answer = altopt("probe", *arguments, "--run", "tiny")
    assert answer.code == code
    assert words in answer.err
    assert len(answer.err.splitlines()) == 1


def test_a_network_that_is_not_there(altopt, workplace):
    answer = altopt("probe", "--recipe", "tiny.toml")
    assert answer.code == 4
    assert "M5 is not in runs/tiny: make it with altopt stage M5" in answer.err
