"""Messages and channels between graphgen's processes. Imports nothing of graphgen's own above it."""
