"""Selective search on a whole split, as R-CNN and Fast R-CNN have their proposals from: P0 and T0."""
# Images are searched by processes, what they find is kept in a journal and written in the split's order.

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from altopt.config import setting
from altopt.datasets.dataset import Dataset
from altopt.errors import ResourceError
from stages.shared.events import ImagesDone
from stages.shared.stage_config import ReadsData, Split
from stages.shared.step import Facts, Runtime, Step, split_of

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    import numpy as np
    from numpy.typing import NDArray

    from cache.journal import Journal

Found = tuple[str, list[list[int]], list[int]]  # image id, x y width height, width and height that they are in


@dataclass(frozen=True, kw_only=True)
class SelectiveSearch(ReadsData):
    """How selective search proposes on the training split; ``min_side`` is in pixels of the original image."""

    table: ClassVar[str] = "selective_search"
    mode: Literal["fast", "quality"] = setting("fast", "R-CNN, section 2.2; Fast R-CNN's boxes are of this mode")
    search_side: int = setting(0, "shorter side of the image that is searched, 0: as it is (R-CNN: 500 px wide)",
                               at_least=0)
    proposals: int = setting(2000, "R-CNN, section 2.2: around 2000", at_least=1)
    min_side: float = setting(20.0, "R-CNN's selective_search_boxes.m: minBoxWidth", at_least=0)
    search_seed: int = setting(3, "py-faster-rcnn RNG_SEED", at_least=0)

    def require_packages(self) -> None:
        """The search is OpenCV's."""
        from altopt.datasets.selective_search import require_opencv

        require_opencv()


@dataclass(frozen=True, kw_only=True)
class SelectiveSearchTest(SelectiveSearch):
    """The same on the test split, by the same settings."""

    split: ClassVar[Split] = "test"


def selective_search(*, out: Path, config: SelectiveSearch, runtime: Runtime) -> Facts:
    """Propose by selective search on every training image; scores are ranks."""
    return _propose_on_split(out, config, runtime)


def selective_search_test(*, out: Path, config: SelectiveSearchTest, runtime: Runtime) -> Facts:
    """Propose by selective search on every test image; scores are ranks."""
    return _propose_on_split(out, config, runtime)


def search_step(artifact: str) -> Step:
    """Return the step that makes P0, P1, ... or T0 by selective search. Raises ``UsageError`` for another name."""
    return Step(artifact, selective_search if split_of(artifact) == "train" else selective_search_test)


def _propose_on_split(out: Path, config: SelectiveSearch, runtime: Runtime) -> Facts:
    """Write the proposals of the config's split to ``out`` and return facts for the record."""
    from contextlib import closing

    from altopt.datasets.opening import open_dataset
    from altopt.datasets.selective_search import require_opencv
    from altopt.proposal_formats.reader import rank_scores
    from cache.files import canonical_json
    from cache.journal import Journal
    from cache.proposals import ProposalWriter

    program = f"OpenCV {require_opencv().__version__}"
    dataset = open_dataset(config.data, config.split, runtime.data_root)
    settings = {name: value for name, value in asdict(config).items() if name != "data"}
    attributes = {"dataset": runtime.data_digest, "source": "selective search", "settings": settings | {"by": program}}
    journal = Journal(out.with_name(f"{out.stem}.partial.jsonl"),
                      canonical_json([runtime.inputs_key, asdict(config), config.split, config.version, program]))
    count = 0
    with ProposalWriter(out, attributes) as writer, closing(journal):
        for done, found in enumerate(_found(dataset, config, journal, runtime.searchers), 1):
            boxes = to_proposals(found, dataset.size(found[0]), config)
            writer.append(found[0], boxes, rank_scores(len(boxes)))
            count += len(boxes)
            runtime.report(ImagesDone(done, len(dataset.ids)))
    journal.remove()
    images = len(dataset.ids)
    return {"images": images, "proposals": count, "per_image": round(count / max(images, 1), 1)}


def to_proposals(found: Found, size: tuple[int, int], config: SelectiveSearch) -> "NDArray[np.float32]":
    """Return the boxes that are large enough, as many as asked for, continuous xyxy in the original frame."""
    import numpy as np

    _, rows, searched = found
    boxes = np.array(rows, np.float64).reshape(-1, 4)  # (K, 4)
    boxes[:, 2:] += boxes[:, :2]  # from width and height to x2, y2
    boxes *= np.tile(size, 2)  # multiplied before it is divided, so that the image's edge stays where it is
    boxes /= np.tile(searched, 2)
    large = (boxes[:, 2:] - boxes[:, :2] >= config.min_side).all(1)  # (K,)
    return boxes[large][: config.proposals].astype(np.float32)


def _found(dataset: Dataset, config: SelectiveSearch, journal: "Journal", workers: int) -> Iterator[Found]:
    """Give what is found in each image of the split, in order: first what the journal kept, then the rest, kept."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from altopt.batches.reading import Prefetcher

    done = 0
    for found in journal.kept():
        done += 1
        yield found
    left = dataset.ids[done:]
    count = min(workers, len(left))
    # Spawned, not forked: the parent has threads and an open HDF5 file. ``rand`` has one state in each process.
    with (ProcessPoolExecutor(count, get_context("spawn"), _prepare) if count else nullcontext() as processes,
          Prefetcher(lambda id: _find(dataset, id, config, processes), left, workers) as ahead):
        for found in ahead:
            journal.append(found)
            yield found


def _find(dataset: Dataset, id: str, config: SelectiveSearch, processes: "ProcessPoolExecutor | None") -> Found:
    from concurrent.futures.process import BrokenProcessPool

    from altopt.batches.samples import resized
    from altopt.datasets.selective_search import selective_search as search
    from altopt.machine.randomness import seed_of

    pixels = dataset.image(id)
    if config.search_side:
        pixels = resized(pixels, config.search_side / min(pixels.shape[:2]))
    arguments = pixels, config.mode, seed_of(config.search_seed, "selective_search", id)
    try:
        boxes = processes.submit(search, *arguments).result() if processes else search(*arguments)
    except BrokenProcessPool:
        raise ResourceError(f"a process that searched {id} ended by itself; where it was killed, the system's log says "
                            "why: run the same command again, after want of memory with fewer --workers") from None
    return id, boxes.tolist(), [pixels.shape[1], pixels.shape[0]]


def _prepare() -> None:
    """Leave Ctrl-C to the parent, and end with it, however that ends."""
    import multiprocessing
    import signal
    import threading
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
