"""From what a model writes to what OpenAI's API calls it: content, reasoning and tool calls.

Pure: text and the places of special tokens in, events out. No I/O, no tokenizer, no torch. `reading.py` is what a
parser reads from, `formats.py` names the formats and chooses. Used by `graphgen.gateway.chat_output`.
"""
