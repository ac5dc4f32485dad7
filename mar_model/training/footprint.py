"""What a model takes of a GPU's memory while it trains: its parameters, and the activations kept for the backward pass."""

import torch

from mar_model.config import MARConfig
from mar_model.mar import MAR

STREAM = 4  # bytes of a value in the residual stream and of what a LayerNorm takes: float32, also under autocast
LOSS_TENSORS = 20  # of (rows, D) float32 that the diffusion loss keeps


def parameter_count(config: MARConfig) -> int:
    """Parameters of the model, counted on the model itself, for which no memory is taken."""
    with torch.device("meta"):
        return sum(one.numel() for one in MAR(config).parameters())


def gathered_parameters(config: MARConfig) -> tuple[int, int]:
    """Parameters of the largest block, and of all that is in no block: what a model whose blocks are sharded gathers at a time."""
    with torch.device("meta"):
        model = MAR(config)
    blocks = [*model.encoder_blocks, *model.decoder_blocks, *model.diffloss.net.res_blocks]
    sizes = [sum(one.numel() for one in block.parameters()) for block in blocks]
    return max(sizes), sum(one.numel() for one in model.parameters()) - sum(sizes)


def activation_bytes(config: MARConfig, masked: int, *, value_bytes: int = 2, recompute: bool = False) -> int:
    """Bytes that one image's forward pass keeps for its backward pass, with `masked` of the L tokens masked; eager, on a GPU.

    `value_bytes`: of a value in matrix products (bf16 2, float32 4). With b = value_bytes, width W, MLP width H and N tokens, a
    transformer block keeps N · (8W + 6bW + 2bH + 2W + H): the two inputs of its norms in float32, what its linear layers, GELU and
    attention take, and a byte a value for each dropout mask. A block of the denoiser of width w keeps (12 + 8b)w for each of its
    R · masked rows. With `recompute` each block keeps its input alone, and the largest block's activations are there once more.
    """
    b, encoder_width, decoder_width, w = value_bytes, config.encoder_width, config.decoder_width, config.denoiser_width
    in_encoder, in_decoder = config.buffer_size + config.tokens - masked, config.buffer_size + config.tokens
    rows = config.diffusion_repeats * masked
    encoder_block, decoder_block = in_encoder * _block(config, encoder_width, b), in_decoder * _block(config, decoder_width, b)
    residual_block = rows * (12 + 8 * b) * w
    if recompute:
        blocks = STREAM * (config.encoder_depth * in_encoder * encoder_width + config.decoder_depth * in_decoder * decoder_width)
        blocks += config.denoiser_depth * rows * b * w + max(encoder_block, decoder_block, residual_block)
    else:
        of_all = (STREAM + 4 * b) * decoder_width  # of all tokens also in the last block: its input, the norm of that, q, k and v
        last = in_decoder * of_all + masked * (_block(config, decoder_width, b) - of_all + b * decoder_width)
        blocks = config.encoder_depth * encoder_block + (config.decoder_depth - 1) * decoder_block + last
        blocks += config.denoiser_depth * residual_block
    ends = rows * ((12 + 5 * b) * w + LOSS_TENSORS * 4 * config.token_dim)  # the denoiser's condition and last layer, the loss
    return blocks + ends


def _block(config: MARConfig, width: int, value_bytes: int) -> int:
    hidden = int(width * config.mlp_ratio)
    masks = (2 * width + hidden) if config.projection_dropout else 0
    return 2 * STREAM * width + 6 * value_bytes * width + 2 * value_bytes * hidden + masks
