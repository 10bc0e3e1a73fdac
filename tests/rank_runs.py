"""Running something as several processes: the test's own functions, or the whole command line."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LOOPBACK = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}


def in_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return ``function(ranks, *arguments)`` of every rank, each a process of its own; no tensors."""
    # Forked from a server that has imported torch and begun no thread: to import it costs seconds in each process.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "h5py", "PIL.Image"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(results, rank, count, port, function, arguments), daemon=True)
                 for rank in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    if errors := [value for value in found.values() if isinstance(value, BaseException)]:
        raise errors[0]
    return [found[rank] for rank in range(count)]


def _rank(results: Any, rank: int, count: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    from altopt.machine.distributed import join_processes

    os.environ.update(LOOPBACK | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    try:
        with join_processes() as ranks:
            value = function(ranks, *arguments)
    except BaseException as error:
        value = error
    results.put((rank, value))


def start(folder: Path, processes: int, *arguments: str) -> subprocess.Popen[str]:
    """Start a command as so many processes."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments, "--processes", str(processes), "--device", "cpu"]
    return subprocess.Popen(command, cwd=folder, env=os.environ | LOOPBACK, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of a launcher's ranks, rank 0 first."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    held: dict[int, int] = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        held |= {int(each[5:]): child for each in environment if each.startswith(b"RANK=")}
    return [held[rank] for rank in sorted(held)]


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
