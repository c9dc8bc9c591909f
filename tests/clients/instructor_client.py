import json
import os
from importlib.metadata import version
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict


class Mood(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mood: Literal["low", "ok"]


client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
mood = client.chat.completions.create(
    model=os.environ["MODEL"], messages=[{"role": "user", "content": "hi"}], max_tokens=40, temperature=0,
    response_model=Mood, max_retries=0,
)  # fmt: skip
print(json.dumps({"version": version("instructor"), "structured": mood.model_dump()}))
