"""DeepSpeed, processes, optimizers, batches, checkpoints, and the ways a training stops."""
