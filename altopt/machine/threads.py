"""Threads beside those that torch computes with."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def single_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Return so many threads, started, in each of which torch computes on that thread alone.

    Otherwise torch would give each of them helpers, as many as the main thread has. As soon as there are more helpers
    than processors, GNU's OpenMP lets idle ones sleep at once, and from then on every small op of the whole program
    waits for one to wake up: 40 to 60 microseconds in place of 8 were measured.
    """
    threads = torch.get_num_threads()
    started = Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread takes over the program's number when it first needs one, and not again
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=start)
    try:
        for _ in range(count):
            pool.submit(int)  # nothing; each starts a thread, as those before have not come to wait for work yet
        started.wait()
    except BaseException:
        started.abort()  # or those that have started would wait for ever
        raise
    finally:
        torch.set_num_threads(threads)  # what other threads begin with; those of the pool stay at one
    return pool
