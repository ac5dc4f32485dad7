"""What autoencoders are trained with: reconstruction terms, perceptual distances, the adversarial term."""
