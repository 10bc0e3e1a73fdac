"""Starting a command as several processes of this machine: torchrun, with one line in place of its report."""

import logging
import os
import signal
import sys
import uuid
from pathlib import Path

from altopt.errors import ResourceError
from altopt.machine.interruption import Terminated

PROGRAM = Path(__file__).parents[2] / "altopt" / "__main__.py"  # by its path: an altopt/ of the user's may lie nearer


def launch(processes: int, arguments: list[str]) -> int:
    """Run the command as so many processes and return the exit code of the one that failed first, or 0.

    Raises ``ResourceError`` for a process that died by itself.
    """
    # Ctrl-C and SIGTERM are passed on, and 30 seconds later what is still there is killed; then they are raised here,
    # as the processes do not speak of them.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process that failed says why
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(1, 1, processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          local_addr="localhost", max_restarts=0, signals_to_handle="SIGTERM,SIGINT")
    try:
        elastic_launch(config, sys.executable)(str(PROGRAM), *arguments)
    except ChildFailedError as error:
        rank, failure = next(iter(error.failures.items()))  # as they were seen; their times are equal
        code = failure.exitcode
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt from None
        if code in (143, -signal.SIGTERM):
            raise Terminated from None
        if code < 0:
            raise ResourceError(f"process {rank + 1} of {processes} ended by {signal.Signals(-code).name}: run the "
                                "same command again to go on") from None
        return code
    except SignalException as error:
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else Terminated) from None
    return 0
