"""Paged attention: the row tables every backend reads, and one module per backend."""
