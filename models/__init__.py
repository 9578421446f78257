"""Models as data: specs, layers, attention, sampling, checkpoints. Knows nothing of processes, buckets or requests."""
