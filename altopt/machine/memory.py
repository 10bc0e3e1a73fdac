"""How much memory this machine has left for one more process. No torch here."""

from pathlib import Path
from typing import NamedTuple

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 states about 2**63 where there is no limit


class Memory(NamedTuple):
    """Bytes that can be had, and what the system can move out to disk beside that."""

    available: int
    swap: int


def memory_left() -> Memory | None:
    """Return the memory left, the limit of a container counted; None where the system does not say (not Linux)."""
    try:
        lines = [line.split() for line in MEMINFO.read_text().splitlines()]
        told = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
        available, swap = told["MemAvailable"], told.get("SwapFree", 0)
    except (OSError, ValueError, KeyError):
        return None
    limit = _limit_left()
    return Memory(available, swap) if limit is None or limit >= available else Memory(limit, 0)


def _limit_left() -> int | None:
    """Return what a container's limit leaves, the cache of files not counted as used; None without a limit."""
    # Version 2 has one folder, version 1 one for each resource. The process sees its own group as the root.
    for folder, limit, used, cache in ((CGROUP, "memory.max", "memory.current", "inactive_file"),
                                       (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                        "total_inactive_file")):
        try:
            most = int((folder / limit).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if most < UNLIMITED:
                return max(0, most - int((folder / used).read_text()) + int(statistics.get(cache, 0)))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
