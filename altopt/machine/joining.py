"""Joining the processes that torchrun started together; torch is imported by those that are several."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from altopt.machine.distributed import SIGNALS, OtherRankError, SingleProcess


@contextmanager
def join_processes() -> Iterator[SingleProcess]:
    """Join the processes that torchrun started together with this one, and end with them; by itself it is alone.

    Raises ``OtherRankError`` in the place of whatever ends this rank, if it is for another one to say why. Of a signal
    the launcher speaks, which all get it from.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield SingleProcess()
        return
    ranks = None
    try:
        from altopt.machine.process_group import ProcessGroup

        ranks = ProcessGroup()
        yield ranks
        ranks.end()
    except BaseException as error:
        code = ranks.fail(error) if ranks else SIGNALS.get(type(error))
        if code is None:
            raise
        raise OtherRankError(code) from None
