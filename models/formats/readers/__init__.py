"""Readers of quantised checkpoints, one for each `quant_method` of a quantization_config.

Each says which tensors of a module make one weight, which LinearFormat that has, and what it is worth; quantised.py
lets a checkpoint show such a weight under one name. Without torch until a weight is read.
"""
