"""Weights of linear layers in other formats than the model's dtype: how they lie, how they are made, how they multiply.

layout.py     the tensors of a format, and what they mean: the reference that every kernel is held to
"""
