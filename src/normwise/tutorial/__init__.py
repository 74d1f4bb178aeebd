"""The tutorial as a program: five norms in one small model on real handwritten digits."""

# What the tutorial compares, in its order: the original's three, and two yardsticks.
NORMS = ("group", "instance", "layer", "batch", "none")

# Which images it trains on; the original takes the test split.
SPLITS = ("test", "train")
