"""GPU memory of a training model: its parameters, and the activations stored for the backward pass."""

import torch

from mar_model.config import MARConfig
from mar_model.mar import MAR

STREAM = 4  # bytes per value of the residual stream and of LayerNorm inputs: float32, also under autocast
LOSS_TENSORS = 20  # (rows, D) float32 tensors that the diffusion loss stores


def parameter_count(config: MARConfig) -> int:
    """The number of parameters, counted on a model on the meta device, which takes no memory."""
    with torch.device("meta"):
        return sum(one.numel() for one in MAR(config).parameters())


def gathered_parameters(config: MARConfig) -> tuple[int, int]:
    """The number of parameters of the largest block, and outside the blocks: what a model with sharded blocks gathers at a time."""
    with torch.device("meta"):
        model = MAR(config)
    blocks = [*model.encoder_blocks, *model.decoder_blocks, *model.diffloss.net.res_blocks]
    sizes = [sum(one.numel() for one in block.parameters()) for block in blocks]
    return max(sizes), sum(one.numel() for one in model.parameters()) - sum(sizes)


def activation_bytes(config: MARConfig, masked: int, *, value_bytes: int = 2, recompute: bool = False) -> int:
    """Bytes per image that the forward pass stores for the backward pass, with `masked` of the L tokens masked; eager, on a GPU.

    `value_bytes`: bytes per value in matrix products (bf16 2, float32 4). With b = value_bytes, width W, MLP width H and N tokens, a
    transformer block stores N · (8W + 6bW + 2bH + 2W + H): the inputs of its two norms in float32; the inputs of linear layers, GELU
    and attention; one byte per value of the dropout masks. The encoder sees the buffer and the unmasked tokens, the decoder the buffer
    and all tokens. A denoiser block of width w stores (12 + 8b)w for each of its R · masked rows. With `recompute` each block stores
    only its input, and one block (the largest) its activations.
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
        of_all = (STREAM + 4 * b) * decoder_width  # for all tokens also in the last block: its input, the normalised input, q, k and v
        last = in_decoder * of_all + masked * (_block(config, decoder_width, b) - of_all + b * decoder_width)
        blocks = config.encoder_depth * encoder_block + (config.decoder_depth - 1) * decoder_block + last
        blocks += config.denoiser_depth * residual_block
    ends = rows * ((12 + 5 * b) * w + LOSS_TENSORS * 4 * config.token_dim)  # the denoiser's condition and last layer, the loss
    return blocks + ends


def _block(config: MARConfig, width: int, value_bytes: int) -> int:
    hidden = int(width * config.mlp_ratio)
    masks = (2 * width + hidden) if config.projection_dropout else 0
    return 2 * STREAM * width + 6 * value_bytes * width + 2 * value_bytes * hidden + masks
