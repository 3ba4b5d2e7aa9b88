"""Training on several processes that ``torchrun`` started, one for each GPU or some on CPUs, on any number of machines.

Two kinds of communication are kept apart. Values of Python and everything that decides what a process does next go
through a gloo group without a time limit, which waits as long as rank 0 takes to write or to evaluate. Tensors of a
training step go through groups of the device's backend: gradients through one, everything else through another, so that
the collectives within a backward pass never mix with those of ``DistributedDataParallel``.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store
from torch.nn.parallel import DistributedDataParallel

from ikem_fast.engine.checkpoints import first_line
from ikem_fast.engine.config import Config, ConfigError, resolve_device
from ikem_fast.engine.watch import Watch
from ikem_fast.engine.world import RankError, Result, World
from ikem_fast.methods import Groups
from ikem_fast.nn.layers import StackedBatchNorm

_WITHOUT_LIMIT = timedelta(days=30)
_JOIN_LIMIT = timedelta(minutes=15)
# How long news of another rank's end may take after communication with it broke.
_NEWS_SECONDS = 5.0
# How long a rank waits for rank 0 to say the same before it shows an error itself.
_SHOWN_SECONDS = 2.0
_LAST_WORDS_SECONDS = 10.0

_current: DistributedWorld | None = None


@dataclass(frozen=True)
class SharedSteps:
    """What training steps that ranks take together need beyond those of a single process.

    Attributes:
        size: number of ranks.
        groups: for the method; over the group of everything but gradients.
    """

    size: int
    groups: Groups
    _gradients: ProcessGroup
    _others: ProcessGroup

    def data_parallel(
        self, contrast: Callable[..., Any], parameters: Sequence[nn.Parameter]
    ) -> DistributedDataParallel:
        """``contrast``, in whose backward pass the parameters' gradients become the mean over ranks.

        Args:
            contrast: what takes a step's losses.
            parameters: all that get a gradient from it, and none that do not.
        """
        return DistributedDataParallel(
            _Contrast(contrast, parameters),
            process_group=self._gradients,
            init_sync=False,  # weights are compared when a run starts
            gradient_as_bucket_view=True,
        )

    def average(self, values: Tensor) -> Tensor:
        """The mean over ranks of a tensor that each has, the same bits on all of them."""
        total = values.clone()
        dist.all_reduce(total, group=self._others)
        return total / self.size

    @torch.no_grad()
    def average_running_statistics(self, method: nn.Module) -> None:
        """Makes running statistics that ranks updated by batches of their own the mean over ranks."""
        norms = [module for module in method.modules() if isinstance(module, StackedBatchNorm) and module.training]
        statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
        mean = self.average(torch.cat([tensor.flatten() for tensor in statistics]))
        parts = mean.split([tensor.numel() for tensor in statistics])
        torch._foreach_copy_(statistics, [part.view_as(old) for part, old in zip(parts, statistics, strict=True)])


class _Contrast(nn.Module):
    """A function as ``DistributedDataParallel`` takes it, with the parameters to reduce the gradients of."""

    def __init__(self, contrast: Callable[..., Any], parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_with_gradient = nn.ParameterList(parameters)
        self._contrast = contrast

    def forward(self, *arguments: Any) -> Any:
        return self._contrast(*arguments)


@dataclass(frozen=True)
class DistributedWorld(World):
    """Several processes.

    Attributes:
        local_rank: number of this process among those of its machine, and of its CUDA device.
    """

    steps_between_agreements: ClassVar[int] = 8
    local_rank: int = 0
    _store: Store = field(kw_only=True)
    _watch: Watch = field(kw_only=True)
    _step_groups: dict[Any, tuple[ProcessGroup, ProcessGroup]] = field(default_factory=dict)

    def device(self, config: Config) -> torch.device:
        """The CUDA device of this process's local rank, or the CPU."""
        if config.device not in ("auto", "cuda", "cpu"):
            raise ConfigError(f"device must be 'auto', 'cuda' or 'cpu' on several processes, got {config.device!r}")
        device = resolve_device(config)
        if device.type == "cpu":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"processes of a machine must be at most its CUDA devices, {torch.cuda.device_count()}, got one of "
                f"LOCAL_RANK={self.local_rank}: start torchrun with another --nproc-per-node"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device(device.type, self.local_rank)

    def from_writer(self, make: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None, None]  # the result, or an error
        if not self.is_writer:
            dist.broadcast_object_list(outcome)
            if outcome[1] is not None:
                raise outcome[1]
            return outcome[0]
        try:
            outcome[0] = make()
        except Exception as error:
            dist.broadcast_object_list([None, _as_sent(error)])
            raise
        dist.broadcast_object_list(outcome)
        return outcome[0]

    def on_writer(self, work: Callable[[], Result]) -> Result | None:
        results: list[Result] = []
        self.from_writer(lambda: results.append(work()))
        return results[0] if results else None

    def gather(self, value: Result) -> list[Result] | None:
        values: list[Any] | None = [None] * self.size if self.is_writer else None
        dist.gather_object(value, values)
        return values

    def gather_all(self, value: Result) -> list[Result]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, number: int | None) -> int | None:
        largest = torch.tensor([-1 if number is None else number])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return None if largest.item() < 0 else int(largest)

    def share_steps(self, device: torch.device, config: Config) -> SharedSteps:
        kinds = self.gather_all(device.type)
        if len(set(kinds)) > 1:
            raise ConfigError(f"device must be of one kind on all ranks, got {', '.join(kinds)}: give device=cpu")
        settings = config.distributed
        key = (device.type, settings.timeout_minutes)
        if key not in self._step_groups:
            backend, limit = _BACKENDS[device.type], timedelta(minutes=settings.timeout_minutes)
            self._step_groups[key] = (
                dist.new_group(backend=backend, timeout=limit),
                dist.new_group(backend=backend, timeout=limit),
            )
        gradients, others = self._step_groups[key]
        groups = Groups(
            keys=others,
            statistics=others if settings.batch_statistics == "synchronised" else None,
            queue=others if settings.queue == "sharded" else None,
        )
        return SharedSteps(self.size, groups, gradients, others)

    def when_another_ends(self, describe: Callable[[], str]) -> None:
        self._watch.describe = describe

    def show(self, text: str) -> None:
        if self.is_writer:
            super().show(text)

    def show_error(self, error: BaseException, text: str) -> None:
        shown, key = False, "ikem_fast/shown"
        with suppress(RuntimeError):  # the store may be gone with rank 0
            if self.is_writer:
                self._store.set(key, text)
            elif not isinstance(error, RankError):
                until = time.monotonic() + _SHOWN_SECONDS
                while not self._store.check([key]) and time.monotonic() < until:
                    time.sleep(0.02)
                shown = self._store.check([key]) and self._store.get(key).decode() == text
        if not shown:
            print(f"error (rank {self.rank}): {text}", file=sys.stderr, flush=True)


_LOCAL = (("WORLD_SIZE", "1"), ("RANK", "0"))
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_SIGNS_OF_COMMUNICATION = ("gloo", "nccl", "connection", "timed out", "timeout")


@contextmanager
def joined() -> Iterator[DistributedWorld]:
    """As ``ikem_fast.engine.world.joined``, for several processes."""
    global _current
    if _current is not None:
        yield _current
        return
    world = _current = _join()
    restore_handler = _let_speak(world._watch)
    try:
        yield world
        world.agree(None)  # nobody leaves while another may still fail
    except BaseException as error:
        explained = _explain(error, world._watch)
        # Groups of a GPU may never get to their end now; those of a CPU must end for others to notice.
        if all(device == "cpu" for device, _ in world._step_groups):
            dist.destroy_process_group()
        if explained is not error:
            raise explained from error
        raise
    else:
        restore_handler()
        dist.destroy_process_group()
    finally:
        _current = None
        world._watch.close()


def _join() -> DistributedWorld:
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = next(dist.rendezvous("env://", timeout=_JOIN_LIMIT))[0]
        watch = Watch.open(rank, size, store, os.environ["MASTER_ADDR"])
        # torchrun keeps the store from attempt to attempt, and what the one before left in it is of no use to this one.
        store = PrefixStore(watch.session, store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_WITHOUT_LIMIT)
        local_size, local_rank = (int(os.environ.get(f"LOCAL_{name}", default)) for name, default in _LOCAL)
        return DistributedWorld(rank, size, local_size, local_rank, _store=store, _watch=watch)
    except KeyError as error:
        raise RankError(f"WORLD_SIZE is set without {error.args[0]}: start several processes with torchrun") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise RankError(f"the processes cannot be joined: {first_line(error)}") from error


def _let_speak(watch: Watch) -> Callable[[], Any]:
    """Lets SIGTERM wait for the last words of a process that ends because another one did.

    ``torchrun`` sends it to all that are left as soon as one has ended. What is returned takes this back.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    old = signal.getsignal(signal.SIGTERM)

    def end(signal_number: int, frame: FrameType | None) -> None:
        if watch.failed_since() < _LAST_WORDS_SECONDS:
            return
        if callable(old):
            old(signal_number, frame)
            return
        signal.signal(signal_number, signal.SIG_DFL if old is None else old)
        os.kill(os.getpid(), signal_number)

    signal.signal(signal.SIGTERM, end)
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL if old is None else old)


def _explain(error: BaseException, watch: Watch) -> BaseException:
    """The end of another rank, if that is what the error comes from; else the others hear of this rank's."""
    if isinstance(error, SystemExit):
        return error  # all ranks agreed on it
    failure = None
    if isinstance(error, RuntimeError) and not type(error).__module__.startswith("ikem_fast"):
        failure = watch.failure(_NEWS_SECONDS)
        if failure is None and any(sign in str(error).lower() for sign in _SIGNS_OF_COMMUNICATION):
            failure = f"communication between ranks broke: {first_line(error)}"
            watch.report(failure)
    if failure is not None:
        return RankError(f"{failure}{watch.describe()}")
    watch.report(" ".join(str(error).split()) or type(error).__name__)
    return error


def _as_sent(error: Exception) -> Exception:
    """An error as other processes can have it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"rank 0 failed: {error}")
    return error
