"""Stages of the pipeline, each a command, and what surrounds them."""

import gc

# Imports leave some 280,000 objects and hardly any garbage. Looked through less often than after every 700 new
# objects, MLflow, pandas and PyTorch are there 0.2 to 0.4 seconds sooner, in each of a dozen stages.
gc.set_threshold(10_000, 10, 10)
