import json
import os
from importlib.metadata import version

import litellm

ask = {
    "model": f"openai/{os.environ['MODEL']}", "api_base": os.environ["OPENAI_BASE_URL"], "max_tokens": 12,
    "temperature": 0, "messages": [{"role": "user", "content": "hi"}],
}  # fmt: skip
print(json.dumps({
    "version": version("litellm"),
    "whole": litellm.completion(**ask).choices[0].message.content,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)),
}))  # fmt: skip
