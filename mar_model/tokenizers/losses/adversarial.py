"""The adversarial term of arXiv 2012.09841 (section 3.1): hinge losses, and the weight that balances them with the reconstruction."""

import torch
from torch import Tensor

STABILIZER = 1e-4  # δ of eq. 7, here 1e-4 as in the published code
LARGEST_WEIGHT = 1e4


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from its logits, of any two shapes: ½(mean relu(1 − real) + mean relu(1 + fake))."""
    return 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """−mean of the discriminator's logits of reconstructions."""
    return -fake.mean()


def adaptive_weight(reconstruction_gradient: Tensor, generator_gradient: Tensor) -> Tensor:
    """‖∇ reconstruction‖ / (‖∇ generator‖ + 1e-4), at most 1e4, of two gradients with respect to the decoder's last layer (eq. 7)."""
    ratio: Tensor = reconstruction_gradient.norm() / (generator_gradient.norm() + STABILIZER)
    return ratio.clamp(0.0, LARGEST_WEIGHT).detach()


def last_layer_gradients(reconstruction: Tensor, generator: Tensor, last_layer: Tensor) -> list[Tensor]:
    """The gradients of both losses with respect to the decoder's last layer, which `adaptive_weight` balances. Both graphs are kept.

    Micro-batches and workers that share a batch average their gradients before they are balanced, so that the weight is the batch's.
    """
    return [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (reconstruction, generator)]
