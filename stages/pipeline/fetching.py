"""Fetching data sets by name."""

from collections.abc import Sequence
from pathlib import Path

from altopt.datasets.download import Progress
from altopt.errors import UsageError
from stages.pipeline.recipe import nearest


def fetch_data_set(name: str, root: Path | None = None, *, subset: str | None = None, manifest: Path | None = None,
                   archive_files: Sequence[Path] = (), mirrors: Sequence[str] = (),
                   progress: Progress | None = None) -> Path:
    """Make the data set lie below ``root`` (by default data, or data/voc07-mini) and return its folder.

    Raises ``UsageError`` for a name or subset that is not known, and whatever ``obtain`` does.
    """
    from altopt.datasets import voc_archives as voc

    if name not in voc.DATA_SETS:
        raise UsageError(f"altopt fetch knows no data set {name!r}{nearest(name, voc.DATA_SETS)}: choose one of "
                         f"{', '.join(voc.DATA_SETS)}")
    if subset is not None and (name, subset) != ("voc07", "mini"):
        raise UsageError(f"{name} has no subset {subset!r}: the only one is that of altopt fetch voc07 --subset mini")
    archives = voc.VOC07_MINI if subset else voc.DATA_SETS[name]
    if manifest:
        archives = voc.read_manifest(manifest, archives[0])
    root = root or Path("data", *(["voc07-mini"] if subset else []))
    return voc.obtain(root, archives=archives, archive_files=archive_files, mirrors=mirrors, progress=progress)
