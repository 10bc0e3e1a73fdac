import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_runs import link_or_copy, make_all, open_tiny, write_recipe

import cli
from cache.files import sha256_file

# Modules of tests that use these make runs of several stages, or start processes.
RUNNERS = {"tiny_runs", "region_runs", "rank_runs"}


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark what makes whole runs or starts processes as ``whole``."""
    for item in items:
        helpers = {getattr(value, "__module__", None) for value in vars(item.module).values()}
        if "finished" in item.fixturenames or helpers & RUNNERS:
            item.add_marker(pytest.mark.whole)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA here")


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder with all artifacts and scores of the tiny recipe, not to be changed."""
    from stages.pipeline.evaluation import summary

    folder = tmp_path_factory.mktemp("finished") / "tiny"
    run = open_tiny(folder)
    run.keep_recipe()
    make_all(run)
    summary(run, "voc07")
    for path in folder.glob("[MPD]?.*"):
        os.utime(path, (0, 0))  # old enough for its hash to be remembered
    run.survey(run.recipe.steps)
    before = {path.name: sha256_file(path) for path in folder.iterdir()}
    yield folder
    assert {path.name: sha256_file(path) for path in folder.iterdir()} == before


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, with tiny.toml in it."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "tiny.toml")
    return tmp_path


@pytest.fixture
def copied(workplace: Path, finished: Path) -> Path:
    """A copy of the finished run as runs/tiny of the current folder."""
    (workplace / "runs").mkdir()
    write_recipe(workplace / "runs" / "tiny.toml")
    folder = Path(shutil.copytree(finished, workplace / "runs" / "tiny", copy_function=link_or_copy))
    memo = folder / ".hashes.json"
    memo.write_text(memo.read_text().replace(str(finished), str(folder)))
    return folder


@pytest.fixture
def altopt(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Answer]]:
    """Run the command line in this process."""
    before, logger = signal.getsignal(signal.SIGTERM), logging.getLogger("altopt")
    handlers = list(logger.handlers)

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = cli.exit_code([str(argument) for argument in arguments])
        logger.handlers[:] = handlers
        return Answer(code, *capsys.readouterr())

    yield run
    logger.handlers[:] = handlers
    signal.signal(signal.SIGTERM, before)
