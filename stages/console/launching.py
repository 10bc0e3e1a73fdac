"""Starting a command as several processes of this machine: torchrun's launcher, without its report of failures."""

import logging
import os
import signal
import sys
import uuid
from pathlib import Path

from altopt.errors import ResourceError


def launch(processes: int, script: Path, arguments: list[str]) -> int:
    """Run the command as so many processes and return the exit code of the one that failed first, or 0.

    Ctrl-C and SIGTERM are passed on, and 30 seconds later what is still there is killed. Raises ``ResourceError`` for a
    process that died by itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process that failed says why
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(1, 1, processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          local_addr="localhost", max_restarts=0, signals_to_handle="SIGTERM,SIGINT")
    try:
        elastic_launch(config, sys.executable)(str(script), *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
                raise ResourceError(f"process {rank + 1} of {processes} ended by {signal.Signals(-code).name}, perhaps "
                                    "for want of memory: run the same command again to go on") from None
        return codes[error.get_first_failure()[0]]
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
