"""Tokenizers: images ↔ latents, behind one interface.

A tokenizer is an `nn.Module` with

- `channels`: values of one latent; `stride`: pixels per latent side; `codebook`: number of codes, 0 for a continuous tokenizer;
- `encode(images)`: moments (continuous), or the latents before quantization and the numbers of their codes (quantized);
- `moments(images)`: moments for either kind;
- `decode(latents)`: images. A quantized tokenizer quantizes the latents first;
- with a codebook, `quantize(latents)`: the nearest codes and their numbers; `codes(indices)`: the latents that these numbers stand for.
"""

from mar_model.tokenizers.directory import Tokenizer, load_tokenizer, make_tokenizer, network_config, save_tokenizer, without_weights
from mar_model.tokenizers.kl import KLAutoencoder, KLConfig
from mar_model.tokenizers.network import NetworkConfig
from mar_model.tokenizers.pixels import PixelTokenizer
from mar_model.tokenizers.posterior import posterior_kl, sample_posterior
from mar_model.tokenizers.quantizer import Quantized
from mar_model.tokenizers.vq import VQAutoencoder, VQConfig

__all__ = [
    "KLAutoencoder", "KLConfig", "NetworkConfig", "PixelTokenizer", "Quantized", "Tokenizer", "VQAutoencoder", "VQConfig",
    "load_tokenizer", "make_tokenizer", "network_config", "posterior_kl", "sample_posterior", "save_tokenizer", "without_weights",
]  # fmt: skip
