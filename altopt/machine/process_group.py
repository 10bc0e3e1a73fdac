"""One of several processes that torchrun started: exchanges by torch.distributed, and the end of all when one is lost.

torchrun ends the others 0.3 s after a process of its machine died, and knows which it was. What it never notices is
a rank that is stopped, another machine that falls silent, and its own death: for these each rank gives a sign of life.
A limit to each exchange would not do: while rank 0 works alone, for hours perhaps, the others wait in a broadcast.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from altopt.errors import LostError, ResourceError
from altopt.machine.distributed import SIGNALS, SingleProcess, Value
from altopt.machine.interruption import Terminated

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30  # beats without one, after which a rank counts as lost
GRACE = 5.0  # seconds for a rank to end by itself once another has failed
JOINING = timedelta(minutes=5)
NO_LIMIT = timedelta(days=365)
GO_ON = "run the same command again to go on"


@contextmanager
def _exchange() -> Iterator[None]:
    """Say in words that the connection to another rank broke."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(f"the connection to another process of this command broke: {GO_ON}") from error


class ProcessGroup(SingleProcess):
    """One of several processes, connected by torch.distributed: nccl between GPUs, gloo between CPUs."""

    def __init__(self) -> None:
        try:
            store, self.rank, self.count = next(rendezvous("env://", timeout=JOINING))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=PrefixStore("torch", store), rank=self.rank, world_size=self.count,
                                    timeout=NO_LIMIT)
        except RuntimeError as error:
            raise ResourceError(f"the processes that were started together do not find each other ({error}): see that "
                                "MASTER_ADDR and MASTER_PORT can be reached, and start them again") from error
        self._store = PrefixStore("altopt", store)
        self._beats_store = PrefixStore("altopt", store.clone())  # one connection waits while another thread uses it
        self._unanswered = False  # by the store
        self._missed = {rank: 0 for rank in range(self.count) if rank != self.rank}
        self._heard = dict(self._missed)
        self._left, self._over = threading.Event(), threading.Event()  # this rank has left; the others cannot go on
        self._watch = threading.Thread(target=self._keep_watch, daemon=True)
        self._watch.start()

    @_exchange()
    def broadcast(self, value: object) -> Any:
        """Return rank 0's value, which is pickled; what the others give does not matter."""
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    @_exchange()
    def all_gather(self, value: Value) -> list[Value]:
        """Return every rank's value, by rank."""
        values = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    @_exchange()
    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value on rank 0, by rank; elsewhere nothing."""
        values = [value] * self.count if self.first else []
        dist.gather_object(value, values or None, dst=0)
        return values

    @_exchange()
    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sums of a tensor over the ranks, on its device."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    @_exchange()
    def all_reduce_max(self, value: int) -> int:
        """Return the greatest of the ranks' values."""
        greatest = torch.tensor(value)
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        return int(greatest)

    @_exchange()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient the sum of the ranks', after ``loss.backward()``; where one has none, it counts as 0.

        Each is sent by itself: what more than two ranks sum has an order, which depends on the place in what is sent,
        and the buckets of DistributedDataParallel are arranged anew after a resumption.
        """
        sums = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                sums.append(dist.all_reduce(parameter.grad, async_op=True))
        for each in sums:
            each.wait()

    def end(self) -> None:
        """Leave with the others, whose work is done too."""
        self.all_gather(None)  # a rank that goes earlier would break the connections of those still at work
        self._left.set()
        self._watch.join()
        dist.destroy_process_group()

    def fail(self, error: BaseException) -> int | None:
        """Leave because of an error; return the code to exit with in silence, or None where it is here to say why."""
        try:
            if isinstance(error, LostError):
                # Whoever ended the connection may have said why. If it died, torchrun says so and ends this wait.
                self._over.wait(GRACE)
        except (KeyboardInterrupt, Terminated) as signalled:
            error = signalled
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to all when one has ended
        speaks, code = False, SIGNALS.get(type(error))
        if code is None:
            speaks, code = self._put_down(getattr(error, "exit_code", 1))
        self._left.set()
        return None if speaks else code

    def _put_down(self, code: int) -> tuple[bool, int]:
        """Put down that this rank failed; return whether it is the first, which has to say why, and the first's code.

        It does so before its connections break, so that others, whose exchanges break then, find it.
        """
        mine = json.dumps([self.rank, code])
        try:
            first = mine if self._unanswered else self._store.compare_set("failure", "", mine).decode()
        except RuntimeError:
            self._unanswered = True
        if self._unanswered:  # so nobody can agree: one of each machine speaks
            return os.environ.get("LOCAL_RANK", "0") == "0", code
        return first == mine, int(json.loads(first)[1])

    def _keep_watch(self) -> None:
        """Give signs of life until this rank leaves; end it if others are lost and it does not notice by itself."""
        pool = ThreadPoolExecutor(1)  # a call to a store on a silent machine never returns, whatever its limit
        lost = None
        while lost is None:
            if self._left.wait(BEAT):
                return
            try:
                lost = pool.submit(self._beat).result(SILENCE * BEAT)
            except TimeoutError:
                lost, self._unanswered = "the machine of the first process does not answer", True
            except RuntimeError:
                lost, self._unanswered = "torchrun, or whoever started this process, is gone", True
        self._over.set()
        if not self._left.wait(GRACE):  # the main thread waits in an exchange, where no exception reaches it
            speaks, code = self._put_down(ResourceError.exit_code)
            if speaks:
                print(f"altopt: {lost}: {GO_ON}", file=sys.stderr, flush=True)
            os._exit(code)

    def _beat(self) -> str | None:
        """Give a sign of life; return who is lost, "" for one that said so itself, None as long as all work."""
        self._beats_store.add(f"beat {self.rank}", 1)
        for rank, heard in self._heard.items():
            self._heard[rank] = self._beats_store.add(f"beat {rank}", 0)
            # Beats are counted, not seconds: a job that is stopped as a whole may go on later.
            self._missed[rank] = self._missed[rank] + 1 if self._heard[rank] == heard else 0
            if self._missed[rank] >= SILENCE:
                return (f"process {rank + 1} of {self.count} gave no sign of life for {SILENCE * BEAT:.0f} s (it was "
                        "stopped, or its machine is gone)")
        return "" if self._beats_store.check(["failure"]) else None
