"""Section `cluster` of the configuration."""

from dataclasses import dataclass

from pipelines.runtime.settings import Count, NonNegative, Whole, operational


@dataclass
class ClusterSettings:
    """Section `cluster`."""

    address: str = operational("", "Ray address (host:port, ray://…, auto); empty: RAY_ADDRESS, else a local Ray instance")
    cpus: Whole = operational(0, "CPUs of a local Ray instance; 0: all CPUs of this machine")
    autoscaling: bool = operational(False, "the cluster scales up on demand: wait for workers that do not fit yet")
    threads: Count = operational(1, "torch threads of each worker without GPU")
    gpus_per_worker: NonNegative = operational(0.0, "GPUs of each training, encoding or generating worker")
