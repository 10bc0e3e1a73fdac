"""Several processes that work on one stage: which part each takes, how they agree, and how they end together.

torchrun starts the same command K times, as ranks 0 to K - 1. Rank 0 alone runs the command: it decides what is stale,
holds the lock and writes. The others wait for the stages that it announces and take their part in those.

Images of a batch are divided among the ranks in order. Losses are means over the images or RoIs of the whole batch,
so each rank weighs its own by its part of the count; gradients are then added up, and every rank takes the same step
(altopt/batches/local_batches.py). So K processes train the network that one trains: to the last bit in batches of at
most two images (``Batch.groups`` says why), and else but for the order of sums; and K processes do it twice alike.

A rank that fails says why, once for all, and the others end with its exit code. One that dies without a word is missed
by the others: every rank leaves a sign of life every few seconds, wherever it is, so no exchange needs a limit of its
own and a long stage of rank 0 alone may take its time. torch is imported by those who have join_processes.
"""

import inspect
import itertools
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from altopt.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Item = TypeVar("Item")
Made = TypeVar("Made")

BEAT = 3.0  # seconds between two signs of life
SILENCE = 30.0  # without one, a rank counts as dead
GRACE = 10.0  # for ranks to end by themselves once another has failed
JOINING = timedelta(minutes=5)
NO_LIMIT = timedelta(days=365)  # signs of life say who is missing
LOST = ("another process of this command died without a word (killed, perhaps for want of memory, or its machine is "
        "gone): run the same command again to go on")


class SingleProcess:
    """One process by itself: what there is to agree on, it decides alone."""

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides and writes."""
        return self.rank == 0

    def announce(self, task: Any) -> None:
        """Rank 0: give the others a task; None is the end."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, which is pickled."""
        return value

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        return [value]

    def all_reduce_sum(self, values: "Tensor") -> "Tensor":
        """Return the sums of a tensor over the ranks, on its device."""
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the greatest of the ranks' values."""
        return value

    def data_parallel(self, module: "nn.Module") -> "nn.Module":
        """Return the module to call, and to keep until ``backward``: that makes each gradient the sum of the ranks'."""
        return module

    def backward(self, loss: "Tensor") -> None:
        """Compute the gradients of a loss that a wrapped module made."""
        loss.backward()  # type: ignore[no-untyped-call]

    def sum_gradients(self, parameters: "Iterable[nn.Parameter]") -> None:
        """Add up each parameter's gradient over the processes, in the order of the parameters."""

    def own_device(self, device: "torch.device") -> "torch.device":
        """Return the device of this rank: each has a GPU of its own. Raises ``UsageError`` where there are too few."""
        return device

    def map_images(self, items: Sequence[Item],
               work: Callable[[Sequence[Item]], Iterator[Made]]) -> Generator[Made, None, None]:
        """Yield on rank 0 what ``work`` makes of the items, one for each and in their order; elsewhere nothing.

        Rank k makes every K-th, beginning with the k-th. All go on in step until the last item is made, or until rank 0
        closes the iterator.
        """
        yield from work(items)


class ProcessGroup(SingleProcess):
    """One of several processes, connected by torch.distributed: nccl between GPUs, gloo between CPUs."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        try:
            store, self.rank, self.count = next(rendezvous("env://", timeout=JOINING))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=PrefixStore("torch", store), rank=self.rank, world_size=self.count,
                                    timeout=NO_LIMIT)
        except RuntimeError as error:
            raise ResourceError(f"the processes that were started together do not find each other ({error}): see that "
                                "MASTER_ADDR and MASTER_PORT can be reached, and start them again") from error
        self._lost = False
        self._store = PrefixStore("altopt", store)
        own_store = PrefixStore("altopt", store.clone())  # one waits while another thread uses it
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, args=(own_store,), daemon=True)
        self._watch.start()

    def announce(self, task: Any) -> None:
        """Rank 0: give the others a task; None is the end."""
        self.broadcast(task)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, which is pickled."""
        import torch
        import torch.distributed as dist

        held = [value]
        with _exchange():
            dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with _exchange():
            dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, values: "Tensor") -> "Tensor":
        """Return the sums of a tensor over the ranks, on its device."""
        return self._reduced(values.clone(), "SUM")

    def all_reduce_max(self, value: int) -> int:
        """Return the greatest of the ranks' values."""
        import torch

        return int(self._reduced(torch.tensor(value), "MAX"))

    def data_parallel(self, module: "nn.Module") -> "nn.Module":
        """Return the module to call, and to keep until ``backward``: that makes each gradient the sum of the ranks'.

        DistributedDataParallel sends gradients off while earlier layers still work on theirs. It would divide the sum
        by the number of ranks; here each loss is a part of the whole batch's already.
        """
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        # Of 1 x 1 convolutions in channels_last layout: the strides mean the same, and the copy is small.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

        # What more than two ranks sum has an order, which depends on the place in what is sent; and buckets are
        # arranged anew after the first step, so also after a resumption. So there each gradient is sent by itself.
        apart = self.count > 2

        def summed(_: None, bucket: dist.GradBucket  # type: ignore[name-defined]
                   ) -> torch.futures.Future[torch.Tensor]:
            def arrived(future: torch.futures.Future[list[torch.futures.Future[list[torch.Tensor]]]]) -> torch.Tensor:
                with self._noticing():
                    for each in future.value():
                        each.value()
                return buffer

            buffer: torch.Tensor = bucket.buffer()
            parts = torch.split(buffer, [each.numel() for each in bucket.gradients()]) if apart else (buffer,)
            with self._noticing():
                works = [dist.all_reduce(part, async_op=True) for part in parts]
            return torch.futures.collect_all([work.get_future() for work in works if work is not None]).then(arrived)

        # All ranks have equal buffers, and none changes in training; PyTorch 2.15 has another word for it.
        known = inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        parallel = DistributedDataParallel(module, gradient_as_bucket_view=True, **options)
        parallel.register_comm_hook(None, summed)
        return parallel

    def backward(self, loss: "Tensor") -> None:
        """Compute the gradients of a loss that a wrapped module made."""
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if self._lost:
                raise ResourceError(LOST) from error
            raise

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Remember that an exchange of gradients broke off: what backward then raises does not say so reliably."""
        try:
            yield
        except RuntimeError:
            self._lost = True
            raise

    def own_device(self, device: "torch.device") -> "torch.device":
        """Return the device of this rank: each has a GPU of its own. Raises ``UsageError`` where there are too few."""
        import torch

        if device.type != "cuda":
            return device
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= torch.cuda.device_count():
            raise UsageError(f"there is no GPU for process {number + 1} of this machine: start at most "
                             f"{torch.cuda.device_count()}, or use --device cpu")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    def map_images(self, items: Sequence[Item],
               work: Callable[[Sequence[Item]], Iterator[Made]]) -> Generator[Made, None, None]:
        """Yield on rank 0 what ``work`` makes of the items, in their order; elsewhere nothing."""
        own = work(items[self.rank :: self.count])
        try:
            for begin in range(0, len(items), self.count):
                made = self._collected(next(own, None))
                yield from made[: len(items) - begin]
                if not self.broadcast(True):
                    return
        except GeneratorExit:
            self.broadcast(False)
            raise

    def sum_gradients(self, parameters: "Iterable[nn.Parameter]") -> None:
        """Add up each parameter's gradient over the processes, in the order of the parameters."""
        import torch
        import torch.distributed as dist

        with _exchange():
            works = []
            for each in parameters:
                if each.requires_grad:
                    each.grad = torch.zeros_like(each) if each.grad is None else each.grad
                    works.append(dist.all_reduce(each.grad, async_op=True))
            for work in works:
                if work is not None:
                    work.wait()

    def fail(self, error: BaseException) -> int | None:
        """Leave because of an error; return None on the first rank to do so, else the exit code of that one."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it to all when one has ended
        self._close()
        return self._failure(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1))

    def end(self) -> None:
        """Leave with the others, whose work is done too."""
        import torch.distributed as dist

        self.all_gather(None)  # nobody goes before all have come
        self._close()
        dist.destroy_process_group()

    def _collected(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, nothing elsewhere."""
        import torch.distributed as dist

        values = [None] * self.count if self.first else None
        with _exchange():
            dist.gather_object(value, values, dst=0)
        return values or []

    def _reduced(self, tensor: "Tensor", operation: str) -> "Tensor":
        import torch.distributed as dist

        with _exchange():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor

    def _failure(self, code: int) -> int | None:
        """Put down that this rank failed, unless another did before: then return that one's exit code."""
        mine = json.dumps([self.rank, code])
        try:
            first = self._store.compare_set("failure", "", mine).decode()
        except RuntimeError:  # whoever kept the store is gone: the launcher, or rank 0
            return None
        return None if first == mine else int(json.loads(first)[1])

    def _close(self) -> None:
        self._closed.set()
        self._watch.join()

    def _keep_watch(self, store: Any) -> None:
        """Give signs of life, and look for those of the others, until this rank leaves or one of them is missing."""
        started = time.monotonic()
        heard = {rank: (b"", started) for rank in range(self.count) if rank != self.rank}
        for beat in itertools.count():
            if self._closed.wait(BEAT):
                return
            try:
                store.set(f"beat {self.rank}", str(beat))
                for rank, (sign, since) in heard.items():
                    new = store.get(f"beat {rank}") if store.check([f"beat {rank}"]) else b""
                    heard[rank] = (sign, since) if new == sign else (new, time.monotonic())
                failed = store.check(["failure"])
            except RuntimeError:  # whoever kept the store is gone
                failed = True
            if failed or any(time.monotonic() - since > SILENCE for _, since in heard.values()):
                self._end_with_the_others()
                return

    def _end_with_the_others(self) -> None:
        """End this process, unless it does so by itself: most often an exchange with the lost rank breaks off."""
        if self._closed.wait(GRACE):
            return
        code = self._failure(ResourceError.exit_code)
        if code is None:
            print(f"altopt: {LOST}", file=sys.stderr, flush=True)
        os._exit(ResourceError.exit_code if code is None else code)


class OtherRankError(Exception):
    """The command ends because of another rank, which has said why; ``exit_code`` is its."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@contextmanager
def join_processes() -> Iterator[SingleProcess]:
    """Join the processes that torchrun started together with this one, and end with them; by itself it is alone.

    Raises ``OtherRankError`` in the place of whatever ends this rank, if another one failed before.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield SingleProcess()
        return
    ranks = ProcessGroup()
    try:
        yield ranks
    except BaseException as error:
        code = ranks.fail(error)
        if code is None:
            raise
        raise OtherRankError(code) from None
    ranks.end()


@contextmanager
def _exchange() -> Iterator[None]:
    """Say in words that the connection to another rank broke."""
    try:
        yield
    except RuntimeError as error:
        raise ResourceError(LOST) from error
