"""A layer's mixture of experts: which experts a row goes to (routing.py), what they make of it (operator.py, on CUDA
tiles.py), and the block of weights around both (block.py)."""
