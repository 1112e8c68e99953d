"""One training on several GPUs: the same loop in every process, each on its share of every batch.

Ray Train starts the processes and connects them; how they share the work is
`search.training.data_parallel`'s. The result is what one process would compute, up to rounding (and
up to what a method draws in its forward, which every process draws for its own images). Only the
first process writes files. Ray is imported when several processes train, not before.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vitpareto.search.files.atomic import disable_writes
from vitpareto.search.files.object_store import ObjectStore
from vitpareto.search.files.write_through import object_store_of
from vitpareto.search.training.data_parallel import rank_and_size
from vitpareto.search.trials.code_check import CODE, check_own_code

T = TypeVar("T")
#: fractions of a GPU: what a trial holds of its first one to measure on, and of each to train on
MEASURING_GPU, TRAINING_GPU = 0.1, 0.9


@dataclass(frozen=True)
class DataParallel:
    """workers: processes that train together. cuda: each has a GPU of its own."""

    workers: int = 1
    cuda: bool = False

    def run(self, call: Callable[[], T], scratch: Path) -> T:
        """Run `call` in all processes and return what the first one's gives.

        Args:
            call: sent to the processes, with every tensor that it holds on the CPU. With one worker
                it is just called.
            scratch: a folder of the study for Ray's record of the run, which is removed.

        Raises what `call` raises.
        """
        if self.workers == 1:
            return call()
        with warnings.catch_warnings():
            # Ray sets options that it deprecates itself
            warnings.simplefilter("ignore", DeprecationWarning)
            return self._train(call, scratch)

    def _train(self, call: Callable[[], T], scratch: Path) -> T:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        first_rank: Any = ray.remote(_FirstRankOutcome).options(num_cpus=0).remote()
        name = f"ray-{uuid.uuid4().hex[:12]}"
        system, path = _storage(scratch)
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"call": ray.put([call]), "outcome": first_rank, "code": CODE},
            torch_config=TorchConfig(backend="nccl" if self.cuda else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self.workers,
                use_gpu=self.cuda,
                resources_per_worker=({"CPU": 0, "GPU": TRAINING_GPU} if self.cuda else {"CPU": 1}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=system,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raised = ray.get(first_rank.get_error.remote())
            raise (raised if raised is not None else error) from error
        finally:
            shutil.rmtree(scratch / name, ignore_errors=True)
        value: T = ray.get(first_rank.get_value.remote())
        ray.kill(first_rank)
        return value


def _storage(scratch: Path) -> tuple[Any, str]:
    """File system and path of Ray's record, which all processes must see."""
    remote = object_store_of(scratch)
    if isinstance(remote, ObjectStore):
        return remote.filesystem, remote.key(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    return None, str(scratch.absolute())


class _FirstRankOutcome:
    """A Ray actor that holds the first process's value, or the first error, after they end."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    def set_value(self, value: Any) -> None:
        self.value = value

    def set_error(self, error: BaseException) -> None:
        self.error = self.error or error

    def get_value(self) -> Any:
        return self.value

    def get_error(self) -> BaseException | None:
        return self.error


def _train_loop(config: dict[str, Any]) -> None:
    """In each process."""
    import ray

    check_own_code(config["code"])
    rank, _ = rank_and_size()
    if rank:
        disable_writes()
    (call,) = ray.get(config["call"])
    try:
        value = call()
    except Exception as error:
        ray.get(config["outcome"].set_error.remote(error))
        raise
    if rank == 0:
        ray.get(config["outcome"].set_value.remote(value))
