"""The format of a latent cache: Arrow IPC shards, their statistics, and the manifest."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mar_model.tokenizers.posterior import LOG_VARIANCE_RANGE

FORMAT_VERSION = 1

MANIFEST = "manifest.json"

SHARDS = "shards"  # the folder of the shards


@dataclass(frozen=True)
class LatentStatistics:
    """Per-channel float64 statistics of posteriors: `values` is the count per channel; all other fields have C numbers."""

    values: int
    mean: list[float]  # of the posterior means
    squares: list[float]  # sum of squared deviations of the posterior means from `mean`
    variances: list[float]  # sum of the posterior variances
    min: list[float]  # of the posterior means
    max: list[float]

    @classmethod
    def of(cls, moments: np.ndarray) -> "LatentStatistics":
        """Statistics of moments (N, 2C, h, w), N ≥ 1."""
        means, log_variances = np.split(moments.astype(np.float64), 2, axis=1)
        over = (0, 2, 3)
        mean = means.mean(over)
        return cls(
            values=means.size // means.shape[1],
            mean=mean.tolist(),
            squares=np.square(means - mean[:, None, None]).sum(over).tolist(),
            variances=np.exp(log_variances.clip(*LOG_VARIANCE_RANGE)).sum(over).tolist(),
            min=means.min(over).tolist(),
            max=means.max(over).tolist(),
        )

    def merged(self, other: "LatentStatistics") -> "LatentStatistics":
        """Statistics of both sets of values together (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        values = self.values + other.values
        mean, theirs = np.array(self.mean), np.array(other.mean)
        shift = theirs - mean
        squares = np.array(self.squares) + np.array(other.squares) + shift**2 * (self.values * other.values / values)
        return LatentStatistics(
            values=values,
            mean=(mean + shift * (other.values / values)).tolist(),
            squares=squares.tolist(),
            variances=(np.array(self.variances) + np.array(other.variances)).tolist(),
            min=np.minimum(self.min, other.min).tolist(),
            max=np.maximum(self.max, other.max).tolist(),
        )

    @property
    def std(self) -> list[float]:
        """Standard deviation of posterior samples: √(variance of the means + mean of the variances)."""
        deviations: list[float] = np.sqrt((np.array(self.squares) + np.array(self.variances)) / self.values).tolist()
        return deviations


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.arrow"


def shard_bytes(keys: list[str], labels: list[int], moments: np.ndarray, flipped: np.ndarray) -> bytes:
    """One shard as an Arrow IPC file of one record batch. `moments` and `flipped` (N, 2C, h, w), float16 or float32."""
    shape = moments.shape[1:]
    values = pa.list_(pa.from_numpy_dtype(moments.dtype), int(np.prod(shape)))
    schema = pa.schema(
        [("key", pa.string()), ("label", pa.int64()), ("moments", values), ("moments_flipped", values)],
        metadata={"format_version": str(FORMAT_VERSION), "moments_shape": json.dumps(shape), "moments_axes": "2C, h, w"},
    )

    def column(array: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), type=values)

    columns = [pa.array(keys, pa.string()), pa.array(labels, pa.int64()), column(moments), column(flipped)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return bytes(sink.getvalue())


@dataclass(frozen=True)
class Manifest:
    """Metadata of a latent cache. `latent_*` have C numbers in the tokenizer's scale, over images and mirror images: mean and standard
    deviation of posterior samples, smallest and largest posterior mean."""

    format_version: int
    rows: int
    shards: list[dict[str, Any]]  # name, rows, sha256, bytes
    class_names: list[str]
    image_size: int
    latent_size: int
    latent_channels: int
    dtype: str
    latent_mean: list[float]
    latent_std: list[float]
    latent_min: list[float]
    latent_max: list[float]
    tokenizer: dict[str, Any]  # digest, config
    images: dict[str, Any]  # the split, and the digest of the list of keys and labels
    rejected: int
    precision: dict[str, Any] = field(default_factory=dict)  # precision of the encoder, measured deviation of the moments

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
