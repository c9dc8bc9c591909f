"""`python -m train push RUN ORG/NAME`: put an adapter or a merged model on the Hub, with its card.

The token is read from the environment variable HF_TOKEN and shown nowhere; HF_ENDPOINT names another hub.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.card import card_text
from train.command import argument, option
from train.errors import UserError
from train.files import write_text
from train.run import Run, open_run

# Only what a model repository holds: never checkpoints, pickles or the conversations.
PUBLISHED = (".safetensors", ".json", ".jinja", ".md", ".model", ".txt")


@dataclass(frozen=True)
class Push:
    """What to publish, and where to."""

    run: str = argument("finished run: its name under runs/, or its path")
    repo: str = argument("repository on the hub: org/name")
    what: str = option("adapter", "adapter, or merged (made by python -m train merge)")
    public: bool = option(False, "make the repository public; private otherwise")
    dry_run: bool = option(False, "list what would be sent and send nothing")


def push(config: Push) -> dict[str, Any]:
    """Send the files, or list them with --dry-run. Raises UserError when there is no token or the hub refuses."""
    run = open_run(config.run)
    if config.repo.count("/") != 1 or not all(config.repo.split("/")):
        raise UserError(f"repo is {config.repo!r}; it must be org/name")
    folder = published_folder(run, config.what)
    # Written again: there may have been an evaluation since.
    write_text(folder / "README.md", card_text(run, merged=config.what == "merged"))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in PUBLISHED}
    for name, size in files.items():
        print(f"{size:>14,}  {name}")
    document = {"repo": config.repo, "what": config.what, "files": files, "bytes": sum(files.values())}
    if config.dry_run:
        return document | {"sent": False, "url": None}
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("no token: set HF_TOKEN to a hub token with write access, or look first with --dry-run")
    return document | {"sent": True, "url": _send(config, folder, list(files), token)}


def published_folder(run: Run, what: str) -> Path:
    """The folder that holds the adapter or the merged model of a run."""
    if what not in ("adapter", "merged"):
        raise UserError(f"what is {what!r}; allowed: adapter, merged")
    folder = run.path / what
    if not folder.is_dir():
        raise UserError(f"run {run.name!r} has no {what}/; make it with python -m train merge {run.name}")
    return folder


def _send(config: Push, folder: Path, names: list[str], token: str) -> str:
    from huggingface_hub import HfApi, errors

    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        hub.create_repo(config.repo, private=not config.public, exist_ok=True)
        done = hub.upload_folder(
            repo_id=config.repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message=f"Upload {config.what} of run {Path(config.run).name}",
        )
    except (errors.HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200].replace(token, "***")
        raise UserError(f"the hub refused {config.repo!r}: {reason}; check HF_TOKEN and the name") from error
    return str(done.repo_url)
