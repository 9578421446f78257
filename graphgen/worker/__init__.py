"""The worker process: the weights, the KV tensors and the graphs of one device. Knows slots, pages and buckets only."""
