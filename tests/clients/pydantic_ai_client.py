import asyncio
import json
import os
from importlib.metadata import version
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.settings import ModelSettings


class Mood(BaseModel):
    mood: Literal["low", "ok"]


model = OpenAIChatModel(os.environ["MODEL"])
plain = Agent(model, model_settings=ModelSettings(max_tokens=12, temperature=0))
shaped = Agent(model, output_type=NativeOutput(Mood), model_settings=ModelSettings(max_tokens=40, temperature=0))


async def streamed() -> str:
    async with plain.run_stream("hi") as result:
        return "".join([text async for text in result.stream_text(delta=True)])


async def main() -> None:
    print(json.dumps({
        "version": version("pydantic-ai-slim"),
        "whole": (await plain.run("hi")).output,
        "streamed": await streamed(),
        "structured": (await shaped.run("hi")).output.model_dump(),
    }))  # fmt: skip


asyncio.run(main())
