"""How the C library hands out memory: a program that computes the same steps again and again should keep what it frees.

By default glibc gives large blocks back to the system when they are freed, and the next step gets them anew, page by
page, zeroed: for VGG16's fc6, whose weights take 411 MB, that costs more than the arithmetic. Where the library is
another one, nothing happens.
"""

import ctypes
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's names for its settings (malloc.h)
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}  # never trim; no block apart from the heap
# What glibc's own thresholds grow to in a program that frees large blocks (mallopt(3)).
GIVE_BACK = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation of this process."""
    _set(KEEP)


def give_back_freed_memory() -> None:
    """Do as glibc does by itself, and give back what was kept."""
    _set(GIVE_BACK)
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _set(values: dict[int, int]) -> None:
    library = _glibc()
    if library is not None:
        for setting, value in values.items():
            library.mallopt(setting, value)


@cache
def _glibc() -> Any:
    """Return the C library if it has these settings, else None."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # TypeError: Windows names no library by None
        return None
