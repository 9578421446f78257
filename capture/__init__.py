"""Buckets, static buffers, graphs and the memory budget. Knows nothing of requests or of any model."""
