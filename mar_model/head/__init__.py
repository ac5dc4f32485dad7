"""The distribution of one token given its condition: the denoiser and its diffusion."""
