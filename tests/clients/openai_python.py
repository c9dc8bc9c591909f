import json
import os

import openai

client = openai.OpenAI()
ask = {
    "model": os.environ["MODEL"],
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 12,
    "temperature": 0,
}
schema = {"type": "object", "properties": {"mood": {"enum": ["low", "ok"]}}, "required": ["mood"],
          "additionalProperties": False}  # fmt: skip
whole = client.chat.completions.create(**ask)
chunks = client.chat.completions.create(**ask, stream=True)
shaped = client.chat.completions.create(
    **{**ask, "max_tokens": 40},
    response_format={"type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}},
)
print(json.dumps({
    "version": openai.__version__,
    "models": [model.id for model in client.models.list()],
    "whole": whole.choices[0].message.content,
    "streamed": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices),
    "structured": json.loads(shaped.choices[0].message.content),
}))  # fmt: skip
