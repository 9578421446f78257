"""How an engine is started: its configuration, its child processes, how often it may be started, stored step times."""
