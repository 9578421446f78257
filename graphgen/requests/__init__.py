"""The user's side of a request: checks, tokens, the link to the scheduler, text, streams. Never loads torch."""
