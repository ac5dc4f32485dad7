"""Where an evaluation fails: metrics by class, and samples that lie close to training images."""
