"""Section `cluster` of the configuration."""

from dataclasses import dataclass

from pipelines.runtime.settings import Count, NonNegative, Whole, operational


@dataclass
class ClusterSettings:
    """Section `cluster`."""

    address: str = operational("", "Ray address (host:port, ray://…, auto); empty: RAY_ADDRESS, else a Ray of its own")
    cpus: Whole = operational(0, "CPUs of a Ray of its own; 0: this machine's")
    autoscaling: bool = operational(False, "the cluster grows when asked: wait for workers that it does not hold yet")
    threads: Count = operational(1, "torch threads of a worker without GPU")
    gpus_per_worker: NonNegative = operational(0.0, "GPUs each training, encoding and generating worker takes")
