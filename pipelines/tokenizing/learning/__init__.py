"""One worker's part of training an autoencoder: batches, losses, optimizers, and the state that a resumed run needs."""
