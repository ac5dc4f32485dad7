"""The processes of a local Ray instance listen on the loopback interface only, so that no other machine can reach them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = "127.0.0.1"
NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
ENVIRONMENT = {  # of all processes of a local Ray instance
    NO_CLUSTER: "0",  # single-node mode: the node's address is 127.0.0.1, as by default on Windows and macOS
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


@contextmanager
def address_of_this_node() -> Iterator[None]:
    """Make `ray.init` in the body use 127.0.0.1 as this node's address if `ENVIRONMENT` is set. (Ray reads the variable only when it is
    imported, and replaces a loopback address passed to `ray.init`.)"""
    from pipelines.runtime.cluster.ray_internals import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(NO_CLUSTER) != "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
