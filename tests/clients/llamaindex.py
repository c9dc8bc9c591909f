import json
import os
from importlib.metadata import version

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

chat = OpenAILike(
    model=os.environ["MODEL"], api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"],
    is_chat_model=True, temperature=0, max_tokens=12,
)  # fmt: skip
ask = [ChatMessage(role="user", content="hi")]
print(json.dumps({
    "version": version("llama-index-llms-openai-like"),
    "whole": chat.chat(ask).message.content,
    "streamed": "".join(chunk.delta or "" for chunk in chat.stream_chat(ask)),
}))  # fmt: skip
