"""One training on several GPUs: the same loop in every process, each on its share of every batch.

Ray Train starts the processes and connects them; how they share the work is
`search.training.data_parallel`. What comes out is what one process would have made, but for
rounding (and for what a method draws in the forward itself, which every process draws for its own
images). Only the first process writes.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from vitpareto.search.files.atomic import disable_writes
from vitpareto.search.files.object_store import ObjectStore
from vitpareto.search.files.write_through import object_store_of
from vitpareto.search.training.data_parallel import ranks

T = TypeVar("T")
#: of a GPU: what a trial keeps of its first one to measure on, and what each process trains on
MEASURES, TRAINS = 0.1, 0.9


@dataclass(frozen=True)
class DataParallel:
    """How many processes train together; cuda: each on a GPU of its own."""

    workers: int = 1
    cuda: bool = False

    def run(self, call: Callable[[], T], scratch: Path) -> T:
        """What `call` gives in the first of the processes; with one worker it is just called.

        call: takes nothing and is sent to the processes, with every tensor that it holds on the
        CPU. scratch: a folder of the study, for Ray's record of the run; gone afterwards. Raises
        what `call` raises.
        """
        if self.workers == 1:
            return call()
        with warnings.catch_warnings():
            # Ray sets what it has deprecated itself, and says so
            warnings.simplefilter("ignore", DeprecationWarning)
            return self._run(call, scratch)

    def _run(self, call: Callable[[], T], scratch: Path) -> T:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0).remote()
        name = f"ray-{uuid.uuid4().hex[:12]}"
        system, place = _storage(scratch)
        trainer = TorchTrainer(
            _loop,
            train_loop_config={"call": ray.put([call]), "mailbox": mailbox},
            torch_config=TorchConfig(backend="nccl" if self.cuda else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self.workers,
                use_gpu=self.cuda,
                resources_per_worker={"CPU": 0, "GPU": TRAINS} if self.cuda else {"CPU": 1},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=place,
                storage_filesystem=system,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raised = ray.get(mailbox.raised.remote())
            raise (raised if raised is not None else error) from error
        finally:
            shutil.rmtree(scratch / name, ignore_errors=True)
        done: T = ray.get(mailbox.read.remote())
        ray.kill(mailbox)
        return done


def _storage(scratch: Path) -> tuple[Any, str]:
    """Where Ray keeps its record: all processes have to see it."""
    remote = object_store_of(scratch)
    if isinstance(remote, ObjectStore):
        return remote.filesystem, remote.key(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    return None, str(scratch.absolute())


class _Mailbox:
    """Keeps what the first process made when the processes are gone."""

    def __init__(self) -> None:
        self.letter: Any = None
        self.error: BaseException | None = None

    def write(self, letter: Any) -> None:
        self.letter = letter

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error

    def read(self) -> Any:
        return self.letter

    def raised(self) -> BaseException | None:
        return self.error


def _loop(config: dict[str, Any]) -> None:
    """In each process."""
    rank, _ = ranks()
    if rank:
        disable_writes()
    (call,) = ray.get(config["call"])
    try:
        made = call()
    except Exception as error:
        ray.get(config["mailbox"].fail.remote(error))
        raise
    if rank == 0:
        ray.get(config["mailbox"].write.remote(made))
