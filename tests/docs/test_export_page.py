"""The code of docs/export.md, run as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset

ROOT = Path(__file__).parents[2]
TORCHVISION, ONNX = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"),
                               re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("form", "code"), [("torchvision", TORCHVISION), ("onnx", ONNX)])
def test_the_page_detects_what_altopt_detects(copied, altopt, form, code):
    if form == "onnx":
        pytest.importorskip("onnx", reason="needs onnx: pip install -e '.[onnx]'")
        pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[onnx]'")
    image = open_dataset(DataConfig(format="shapes", train=("train:1",), test=("test:1",), width=96, height=80), "test",
                         None).image("test-00000")
    Image.fromarray(image).save("photo.jpg")
    assert altopt("export", "M5", "--format", form, "--run", "tiny", "--set", "detect.score=0.05").code == 0
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False,
                            env={"OMP_NUM_THREADS": "1"})
    assert (answer.returncode, answer.stderr) == (0, "")
    assert len(answer.stdout.splitlines()) > 5
    assert re.match(r"(circle|square|triangle|cross|ring) 0\.\d+ \[", answer.stdout)
