"""Mean and covariance of image features as a file, and the Fréchet distance between two of them; all in float64."""

from dataclasses import dataclass

import numpy as np

from pipelines.evaluation import npz
from pipelines.evaluation.metrics.frechet import FeatureSums, frechet_distance
from pipelines.runtime import storage
from pipelines.runtime.errors import UserError
from pipelines.runtime.records import damaged

__all__ = ["FeatureStatistics", "FeatureSums", "distance", "frechet_distance"]

REMEDY = "name other statistics in evaluate.reference, or the images or the latent cache that they are made of"


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features of D dimensions; on disk an `.npz` in ADM's layout (`mu`, `sigma`) with three more entries."""

    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D), divided by count − 1 as numpy.cov does
    count: int | None = None  # images; None in files that don't say (ADM's)
    network: str | None = None
    digest: str | None = None  # of the network
    made_of: str = ""  # JSON, the identity of the images; empty where the file does not say

    @classmethod
    def of(cls, sums: FeatureSums, network: str, digest: str) -> "FeatureStatistics":
        """Of the sums of features. Raises ValueError for fewer than two images: they have no covariance."""
        return cls(*sums.moments(), sums.count, network, digest)

    def identity(self) -> dict[str, str]:
        """Their content, whichever file they came from."""
        return {"kind": "statistics", "digest": storage.digest(self.mu.tobytes() + self.sigma.tobytes())}

    def save(self, path: str) -> None:
        """Write `path` (.npz) atomically. Raises ValueError when count, network or digest is unknown."""
        if self.count is None or self.network is None or self.digest is None:
            raise ValueError("statistics of unknown count or network are only read, never written")
        npz.save(path, {"mu": self.mu, "sigma": self.sigma, "count": self.count, "network": self.network, "digest": self.digest})

    @classmethod
    def load(cls, path: str) -> "FeatureStatistics":
        """Read our own files and ADM's. Raises UserError when the file is missing or holds statistics of fewer than two images, and
        DamagedFileError when it holds no `mu` and `sigma` that fit, or values that are not finite."""
        if not storage.exists(path):
            raise UserError(f"statistics {path!r} are not there; expected an .npz with mu and sigma")
        entries = npz.read(path, ("mu", "sigma", "count", "network", "digest", "made_of"), REMEDY)
        try:
            count = int(entries["count"]) if "count" in entries else None
        except (ValueError, TypeError) as error:
            raise damaged(path, f"its count is no number: {error}", REMEDY) from error
        shapes = {name: entries[name].shape for name in ("mu", "sigma") if name in entries}
        if len(shapes) < 2 or len(shapes["mu"]) != 1 or shapes["sigma"] != shapes["mu"] * 2:
            raise damaged(path, f"it holds {shapes or 'neither mu nor sigma'}, expected mu (D,) and sigma (D, D)", REMEDY)
        for name in shapes:
            if not np.isfinite(entries[name]).all():
                raise damaged(path, f"{name} holds values that are not finite", REMEDY)
        if count is not None and count < 2:
            raise UserError(f"{path} holds statistics of {count} image(s), expected 2 or more: one image has no covariance")
        return cls(
            mu=entries["mu"].astype(np.float64),
            sigma=entries["sigma"].astype(np.float64),
            count=count,
            network=str(entries["network"]) if "network" in entries else None,
            digest=str(entries["digest"]) if "digest" in entries else None,
            made_of=str(entries.get("made_of", "")),
        )


def distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Fréchet distance of two sets' statistics."""
    return frechet_distance(one.mu, one.sigma, other.mu, other.sigma)
