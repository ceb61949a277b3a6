"""What has learned parameters: the transformer, its attention, and the autoencoder in front of it."""
