"""GGUF files, as llama.cpp's converters write them: what they say becomes a Hugging Face config and canonical tensors,
so that nobody else knows which kind of file a model came from."""
