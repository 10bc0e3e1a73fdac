"""How much memory a step takes at its peak."""

import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The rise of memory during a step, in bytes, above what the process or the GPU held before it.

    On the CPU that is the resident high-water mark, which Linux lets a process reset; ``rise`` is None elsewhere.
    Memory that the C library kept for itself from earlier steps is no rise: have it given back before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: int | None = None

    def start(self) -> None:
        """Begin a step."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return
        try:
            RESET.write_text("5")
            self._before = _resident("VmRSS")
        except (OSError, AttributeError):
            self._before = None

    def rise(self) -> int | None:
        """Return the rise since ``start``."""
        if self._before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return max(0, _resident("VmHWM") - self._before)


def touch(count: int) -> None:
    """Let the process have so many bytes of free memory, where the C library keeps what is freed: each page is used.

    And some more, as to align a block the library looks for a larger one than it hands out; and twice, as what is freed
    joins free memory before it, where the next block then begins.
    """
    for _ in range(2):
        torch.empty(count + 2**20, dtype=torch.uint8)[:: mmap.PAGESIZE] = 0


def held_bytes(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Return the size of weights, buffers and momenta, each counted once."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    if optimizer is not None:
        tensors += [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
    return size_of(tensors)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
