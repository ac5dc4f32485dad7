"""Plain PyTorch: the MAR model, its diffusion, generation, tokenizers and checkpoints. Usable without Ray or a cluster."""

from mar_model.config import Architecture, MARConfig
from mar_model.mar import MAR, TrainingDraws
from mar_model.noise import SampleNoise, stream
from mar_model.sampling.generate import generate
from mar_model.sampling.options import Completion, GenerationOptions
from mar_model.sampling.token_sampler import TokenSampler
from mar_model.version import __version__

__all__ = [
    "MAR",
    "Architecture",
    "Completion",
    "GenerationOptions",
    "MARConfig",
    "SampleNoise",
    "TokenSampler",
    "TrainingDraws",
    "__version__",
    "generate",
    "stream",
]
