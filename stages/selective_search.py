"""Selective search on a whole split, as R-CNN and Fast R-CNN have their proposals from: P0 and T0."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from altopt.config import sourced
from altopt.datasets.dataset import DataConfig
from stages.step import Runtime, Step


@dataclass(frozen=True, kw_only=True)
class SelectiveSearch:
    """How selective search proposes on the training split; ``min_side`` is in pixels of the original picture."""

    version: ClassVar[int] = 1
    split: ClassVar[Literal["train", "test"]] = "train"
    table: ClassVar[str] = "selective_search"
    data: DataConfig
    mode: Literal["fast", "quality"] = sourced("fast", "R-CNN, section 2.2; Fast R-CNN's boxes are of this mode")
    search_side: int = sourced(0, "shorter side of the picture that is searched, 0: as it is (R-CNN: 500 px wide)")
    proposals: int = sourced(2000, "R-CNN, section 2.2: around 2000")
    min_side: float = sourced(20.0, "R-CNN's selective_search_boxes.m: minBoxWidth")
    search_seed: int = sourced(3, "pfr RNG_SEED")


@dataclass(frozen=True, kw_only=True)
class SelectiveSearchTest(SelectiveSearch):
    """The same on the test split, by the same settings."""

    split: ClassVar[Literal["train", "test"]] = "test"


def selective_search(*, out: Path, config: SelectiveSearch, runtime: Runtime) -> dict[str, Any]:
    """Propose by selective search on every training picture; scores are ranks."""
    from stages.searching import propose_on_split

    return propose_on_split(out, config, runtime)


def selective_search_test(*, out: Path, config: SelectiveSearchTest, runtime: Runtime) -> dict[str, Any]:
    """Propose by selective search on every test picture; scores are ranks."""
    from stages.searching import propose_on_split

    return propose_on_split(out, config, runtime)


def search_step(artifact: str) -> Step:
    """Return the step that makes P0, P1, ... or T0 by selective search. Raises ``UsageError`` for another name."""
    from stages.importing import split_of

    return Step(artifact, selective_search if split_of(artifact) == "train" else selective_search_test)
