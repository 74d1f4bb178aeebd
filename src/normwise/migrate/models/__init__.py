"""Models and weights that Keras 2 saved, read, built and converted."""
