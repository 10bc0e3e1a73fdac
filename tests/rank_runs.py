"""Running something as several processes: the test's own functions, or the whole command line."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROGRAM = Path(__file__).parents[1] / "altopt" / "__main__.py"
LOOPBACK = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}


def in_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return ``function(ranks, *arguments)`` of every rank, each a process of its own; no tensors."""
    # Forked from a server that has imported torch and begun no thread: to import it costs seconds in each process.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "h5py", "PIL.Image"])
    port = free_port()
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
    from altopt.machine.joining import join_processes

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
    """Start a command as so many processes, by its own launcher."""
    return started(folder, [str(PROGRAM), *arguments, "--processes", str(processes), "--device", "cpu"])


def start_agent(folder: Path, port: int, *arguments: str) -> subprocess.Popen[str]:
    """Start torchrun's agent as one of two machines with a process each; without -- it takes --run for its own."""
    return started(folder, ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                            f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=altopt", "--local-addr=localhost",
                            "--", str(PROGRAM), *arguments, "--device", "cpu"])


def started(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, env=os.environ | LOOPBACK, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of a launcher's ranks, rank 0 first."""
    children = map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split())
    return sorted((child for child in children if rank_of(child) >= 0), key=rank_of)


def rank_of(process: int) -> int:
    """Return the rank that a process was started as, or -1."""
    environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((int(each[5:]) for each in environment if each.startswith(b"RANK=")), -1)


def works(process: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
