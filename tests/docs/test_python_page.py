"""The code of docs/python.md, run as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from altopt.datasets.dataset import DataConfig
from altopt.datasets.opening import open_dataset

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"),
                    re.MULTILINE | re.DOTALL)


def test_the_page_has_code_and_no_block_is_missed():
    assert len(BLOCKS) == (ROOT / "docs" / "python.md").read_text(encoding="utf-8").count("```") // 2 >= 8


@pytest.fixture
def demo(copied):
    """A run and a photograph under the names that the page expects."""
    copied.rename(copied.with_name("shapes"))
    image = open_dataset(DataConfig(format="shapes", train=("train:1",), test=("test:1",), width=96, height=80), "test",
                         None).image("test-00000")
    Image.fromarray(image).save("photo.jpg")
    return copied.parents[1]


def test_every_block_runs(demo):
    answer = subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(BLOCKS)], cwd=demo, capture_output=True,
                            text=True, check=False, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (answer.returncode, answer.stderr) == (0, "")
    assert {"drawn.png", "M0.safetensors", "M1.safetensors", "P1.h5"} <= {path.name for path in demo.iterdir()}
    assert "circle" in answer.stdout
