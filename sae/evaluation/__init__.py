"""What is measured of a trained autoencoder: sums in float64, batch by batch, so that memory does not grow."""
