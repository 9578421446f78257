"""Engines on many machines: Ray starts and watches them, tokens stay on graphgen's own protocol."""
