"""graphgen beside vLLM and SGLang: figures measured elsewhere, as a file, a picture and a table."""
