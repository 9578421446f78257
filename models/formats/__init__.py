"""Weights of linear layers in other formats than the model's dtype: how they lie, how they are made, how they multiply.

layout.py     the tensors of a format, and what they mean: the reference that every kernel is held to
linear.py     a layer, whatever its format
products.py   how a device multiplies by a weight in a format
cpu_int4.py   torch's own product of int4 on the CPU
quantise.py   from floating point to a format
fitting.py    which format some rows and columns of a stored weight can have
arranging.py  a stored weight in the format that was found
"""
