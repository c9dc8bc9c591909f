"""`python -m train push RUN ORG/NAME`: upload an adapter or a merged model to the Hub, with its card.

The token comes from the environment variable HF_TOKEN and is never printed. HF_ENDPOINT selects another hub.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from counsel.cli import argument, option
from counsel.errors import UserError
from counsel.files import read_json, write_text
from counsel.run import Run, open_run
from train.card import card_text

# Only what belongs in a model repository: never checkpoints, pickles or the conversations.
PUBLISHED = (".safetensors", ".json", ".jinja", ".md", ".model", ".txt")
# Where PEFT and transformers save the name of the model's origin: for a local base, a path on this machine.
ORIGINS = {"adapter_config.json": "base_model_name_or_path", "config.json": "_name_or_path",
           "tokenizer_config.json": "name_or_path"}  # fmt: skip
# Time limits for a connection, and between two parts of an answer. An upload has no limit while data flows.
CONNECT_S, ANSWER_S = 10.0, 60.0


@dataclass(frozen=True)
class Push:
    """What to publish, and where."""

    run: str = argument("finished run: its name under runs/, or its path")
    repo: str = argument("repository on the hub: org/name")
    what: Literal["adapter", "merged"] = option(
        "adapter", "what to send; `python -m train merge` makes the merged model"
    )
    public: bool = option(False, "make the repository public; private otherwise")
    dry_run: bool = option(False, "list what would be sent, and send nothing")


def push(config: Push) -> dict[str, Any]:
    """Upload the files, or list them with --dry-run. Raises UserError without a token, or if the hub refuses."""
    run = open_run(config.run)
    if config.repo.count("/") != 1 or not all(config.repo.split("/")):
        raise UserError(f"repo is {config.repo!r}; it must be org/name")
    folder = published_folder(run, config.what)
    # Written again, because the run may have been evaluated since.
    write_text(folder / "README.md", card_text(run, merged=config.what == "merged"))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in PUBLISHED}
    for name, size in files.items():
        print(f"{size:>14,}  {name}")
    document = {"repo": config.repo, "what": config.what, "files": files, "bytes": sum(files.values())}
    if config.dry_run:
        return document | {"sent": False, "url": None}
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("no token: set HF_TOKEN to a hub token with write access, or list the files with --dry-run")
    return document | {"sent": True, "url": _send(config, folder, list(files), run.summary()["base"]["name"], token)}


def published_folder(run: Run, what: str) -> Path:
    """The folder that holds the adapter or the merged model of a run."""
    folder = run.path / what
    if not folder.is_dir():
        raise UserError(f"run {run.name!r} has no {what}/; make it with python -m train merge {run.name}")
    return folder


def _send(config: Push, folder: Path, names: list[str], base_name: str, token: str) -> str:
    import httpx2
    from huggingface_hub import HfApi, errors, get_session

    # By default the hub's client waits forever.
    get_session().timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S)
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        with tempfile.TemporaryDirectory() as staged:
            _stage(folder, names, base_name, Path(staged))
            hub.create_repo(config.repo, private=not config.public, exist_ok=True)
            done = hub.upload_folder(
                repo_id=config.repo,
                folder_path=staged,
                commit_message=f"Upload {config.what} of run {Path(config.run).name}",
            )
    except httpx2.TimeoutException as error:
        raise UserError(f"the hub at {hub.endpoint} did not answer within {ANSWER_S:g} s; try again later") from error
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise UserError(
            f"the hub refused {config.repo!r}: {_reason(error, token)}; check HF_TOKEN and the name"
        ) from error
    except (ValueError, KeyError) as error:
        # The hub rejected the metadata, or the server is not a hub.
        raise UserError(f"the hub at {hub.endpoint} rejected {config.repo!r}: {_reason(error, token)}") from error
    return str(done.repo_url)


def _stage(folder: Path, names: list[str], base_name: str, staged: Path) -> None:
    """Link the files into `staged`; copy the configs that name a path on this machine, with the base's name instead."""
    for name in names:
        origin = ORIGINS.get(name)
        document = read_json(folder / name) if origin else {}
        if origin and Path(str(document.get(origin) or "")).is_absolute():
            (staged / name).write_text(json.dumps(document | {origin: base_name}, indent=2) + "\n", encoding="utf-8")
        else:
            (staged / name).symlink_to((folder / name).resolve())


def _reason(error: Exception, token: str) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".replace(token, "***")
