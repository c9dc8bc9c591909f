"""llm, as its documentation has people add a server: extra-openai-models.yaml in its folder, then `llm -m`."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([{
        "model_id": "here", "model_name": os.environ["MODEL"], "api_base": os.environ["OPENAI_BASE_URL"],
        "api_key_name": "here",
    }]))  # fmt: skip
    Path(folder, "keys.json").write_text(json.dumps({"here": os.environ["OPENAI_API_KEY"]}))
    ask = ["-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "12", "hi"]

    def said(*more: str) -> str:
        done = subprocess.run([sys.executable, "-m", "llm", *ask, *more], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.removesuffix("\n")

    print(json.dumps({"version": version("llm"), "whole": said("--no-stream"), "streamed": said()}))
