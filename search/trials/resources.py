"""How trials share a cluster's CPUs and GPUs. Arithmetic only; does not import ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.distributed import MEASURING_GPU
from vitpareto.search.trials.nodes import Node, latency_slot, most_cpus

#: trials on the CPUs of one machine slow each other down beyond this many
MOST_ON_ONE_MACHINE = 8


@dataclass(frozen=True)
class TrialResources:
    """workers: trials at a time. cpus, gpus: of one trial."""

    workers: int
    cpus: int
    gpus: float

    @classmethod
    def of(
        cls, config: SearchConfig, device: str, cpus: int, gpus: int, nodes: Sequence[Node] = ()
    ) -> TrialResources:
        """Divide a cluster among trials.

        Args:
            cpus, gpus: of the whole cluster.
            nodes: its nodes; none means a single one.

        Raises UserError if the job asks for more than the cluster has.
        """
        cuda = device.startswith("cuda")
        able = [n for n in nodes if n.gpus or not cuda]
        if config.latency_on is not None and nodes:
            cpus, gpus = _without_slot(config.latency_on, cuda, cpus, gpus, nodes)
        if config.times_trials and config.latency_on is None:
            if cuda:
                _gpus_per_trial(config, gpus, nodes)
            # a latency is measured alone on its device, never beside another worker
            resources = cls(1, cpus, 1.0 if cuda else 0.0)
        elif cuda:
            share = _gpus_per_trial(config, gpus, nodes)
            workers = config.workers or max(1, int(gpus / share))
            # a trial on several GPUs measures on a part of one and trains on the rest of all
            measures = share if share <= 1 else MEASURING_GPU
            resources = cls(workers, max(1, cpus // (2 * workers)), measures)
        else:
            workers = config.workers or min(cpus, MOST_ON_ONE_MACHINE * max(1, len(able)))
            resources = cls(workers, max(1, cpus // workers), 0.0)
        if not able:
            return resources
        return replace(resources, cpus=min(resources.cpus, max(1, most_cpus(able))))

    def fit(self, available: Mapping[str, float]) -> int:
        """How many trials fit at a time into the resources of a cluster."""
        needed = {"CPU": self.cpus, "GPU": self.gpus}
        return min(int(available.get(k, 0.0) / amount) for k, amount in needed.items() if amount)


def _gpus_per_trial(config: SearchConfig, gpus: int, nodes: Sequence[Node]) -> float:
    """GPUs of one trial. Raises UserError if the cluster has fewer."""
    share = config.gpus_per_trial or 1.0
    if share > gpus:
        listed = "; ".join(str(n) for n in nodes)
        raise UserError(
            f"gpus_per_trial must be at most the cluster's {gpus} GPUs (got {share:g})"
            + (f"; nodes: {listed}" if listed else ""),
            Code.OUT_OF_RANGE,
            key="gpus_per_trial",
            got=share,
            accepted=gpus,
        )
    return share


def _without_slot(
    target: str, cuda: bool, cpus: int, gpus: int, nodes: Sequence[Node]
) -> tuple[int, int]:
    """CPUs and GPUs that the slot for latencies leaves. Raises UserError if it leaves none."""
    slot = latency_slot(target, nodes)
    cpus, gpus = cpus - int(slot.cpus), gpus - int(slot.gpus)
    if cpus < 1 or (cuda and gpus < 1):
        raise UserError(
            f"latency_on must leave resources for trials (got {target!r}, which uses all of the "
            "cluster); add a node, or remove latency_on",
            Code.UNAVAILABLE,
            key="latency_on",
            got=target,
            cpus=cpus,
            gpus=gpus,
        )
    return cpus, gpus
