"""Sets of images whose features are computed: real images, decoded latents, noise, drawn samples, and samples that others made."""
