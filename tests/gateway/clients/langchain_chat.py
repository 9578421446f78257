"""LangChain's chat model. Arguments: base URL, model. Prints what came of each call as one line of JSON."""

import json
import sys

from langchain_openai import ChatOpenAI

base_url, model = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=base_url, api_key="none", temperature=0, max_completion_tokens=24)
whole = chat.invoke("Good morrow")
chunks = list(chat.stream("Good morrow"))
kind = ""
try:
    chat.invoke("ah " * 1500)
except Exception as error:
    kind = type(error).__name__
print(
    json.dumps(
        {
            "whole": whole.content,
            "finish": whole.response_metadata["finish_reason"],
            "usage": whole.usage_metadata["output_tokens"],
            "streamed": "".join(chunk.content for chunk in chunks),
            "long": kind,
        }
    )
)
