"""What a Python program calls: Engine and AsyncEngine."""
