"""OpenAI's API over HTTP: a process of a server that is a client of its frontend. No torch, no tokenizer."""
