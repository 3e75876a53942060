"""The training system: models, losses, optimizers, strategies, workers, servers and the driver."""
