"""Clients of other stacks, each as its own documentation uses it, against the same server.

They are not part of this project's environment. Point CLIENTS_PYTHON at a Python that has them, and CLIENTS_NODE at a
folder whose node_modules has them; a client that is absent is skipped. docs/serving.md lists which versions were run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Served

SCRIPTS = Path(__file__).parent / "clients"
PYTHON = {
    "openai_python": "openai",
    "langchain": "langchain_openai",
    "llamaindex": "llama_index.llms.openai_like",
    "litellm_client": "litellm",
    "instructor_client": "instructor",
    "pydantic_ai_client": "pydantic_ai",
    "llm_client": "llm",
}
NODE = {"openai_node": "openai", "ai_sdk": "@ai-sdk/openai-compatible"}


def command(script: str, folder: Path) -> list[str]:
    """How the client is run; skips where it is not installed."""
    if script in PYTHON:
        python = os.environ.get("CLIENTS_PYTHON", sys.executable)
        if subprocess.run([python, "-c", f"import {PYTHON[script]}"], capture_output=True).returncode:
            pytest.skip(f"{python} has no {PYTHON[script]}; CLIENTS_PYTHON names another Python")
        return [python, str(SCRIPTS / f"{script}.py")]
    modules = Path(os.environ.get("CLIENTS_NODE", "absent")) / "node_modules"
    if not (modules / NODE[script]).is_dir():
        pytest.skip(f"no {NODE[script]} in node_modules; CLIENTS_NODE names a folder that has it")
    # Node looks for modules beside the script.
    (folder / "node_modules").symlink_to(modules.resolve())
    (folder / f"{script}.mjs").write_text((SCRIPTS / f"{script}.mjs").read_text(encoding="utf-8"), encoding="utf-8")
    return ["node", str(folder / f"{script}.mjs")]


@pytest.mark.parametrize("model", ["base", "calm"])
@pytest.mark.parametrize("script", [*PYTHON, *NODE])
def test_a_client_of_another_stack_gets_the_same_answer(server: Served, tmp_path: Path, script: str, model: str):
    """Whole or streamed, the text is what a plain request gets; a JSON schema is followed; names are listed."""
    name = server.base.name if model == "base" else model
    ran = command(script, tmp_path)
    expected = server.client().chat.completions.create(
        model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=12, temperature=0
    )
    environment = {
        "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": server.user_key, "MODEL": name,
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_PROXY": "*", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }  # fmt: skip

    done = subprocess.run(ran, capture_output=True, text=True, env=environment)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {found[key] for key in ("whole", "streamed") if key in found} <= {expected.choices[0].message.content}
    assert found.get("structured", {"mood": "ok"})["mood"] in ("low", "ok")
    assert name in found.get("models", [name])
