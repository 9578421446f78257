"""What a program gives and gets, of an engine as of a client: prompts, sampling parameters, outputs, streams, and how a
thread and a task wait for them. Knows no engine and no server."""
