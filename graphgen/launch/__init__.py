"""What an engine is started with: its configuration, its child processes, stored step times."""
