import json
import os
from importlib.metadata import version
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Mood(BaseModel):
    mood: Literal["low", "ok"]


chat = ChatOpenAI(model=os.environ["MODEL"], temperature=0, max_tokens=12)
shaped = ChatOpenAI(model=os.environ["MODEL"], temperature=0, max_tokens=40).with_structured_output(
    Mood, method="json_schema"
)
print(json.dumps({
    "version": version("langchain-openai"),
    "whole": chat.invoke("hi").content,
    "streamed": "".join(chunk.content for chunk in chat.stream("hi")),
    "structured": shaped.invoke("hi").model_dump(),
}))  # fmt: skip
