"""Computing in a fixed order: the same inputs on the same machine give the same bits, on CUDA too.

The CPU does so by itself with the same number of threads. On CUDA some ops add atomically, in the order in which their
threads happen to arrive; torch's own switch replaces them, and ``altopt.ops.roi_pool`` follows that switch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from altopt.errors import UsageError

WORKSPACE = ":4096:8"  # cuBLAS repeats itself with a workspace of fixed size; it reads this when it is first used
NO_SUCH_FORM = "does not have a deterministic implementation"


@contextmanager
def fixed_order(wanted: bool = True) -> Iterator[None]:
    """Let torch use nothing but deterministic algorithms inside the block, if that is ``wanted``.

    Raises ``UsageError`` for an op that has none, instead of torch's warning: what promises equal bits must not go on
    without them. Not wanted, torch's switch stays as it is.
    """
    if not wanted:
        yield
        return
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if NO_SUCH_FORM not in str(error):
            raise
        raise UsageError(f"--deterministic: this PyTorch has no deterministic form of {str(error).split()[0]}: use "
                         "--device cpu, or leave --deterministic out") from error
    finally:
        torch.use_deterministic_algorithms(before)
