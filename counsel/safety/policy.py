"""`Policy`: what the crisis gate does, as one YAML file.

    counsel serve --safety policy.yaml

Every key has a default, so the shipped policy is an empty file. Paths in it are relative to it.
"""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from counsel.cli import load_config, option
from counsel.errors import UserError
from counsel.safety.labels import RISKS
from counsel.safety.resources import SHIPPED as SHIPPED_RESOURCES
from counsel.safety.resources import read_resources
from counsel.safety.texts import Texts, read_texts
from counsel.values import NonNegativeFloat, PositiveFloat, PositiveInt, Share, check_bounds, checked_url

ON, OFF = "on", "off"
_SCOPE, _DETECTION, _GUARD = "scope", "detection", "guard model"
_DISCLOSURE, _ESCALATION = "disclosure", "escalation"


@dataclass(frozen=True)
class Policy:
    """Whom the gate covers, what counts as a risk, and what it then says and does."""

    models: tuple[str, ...] = option(
        ("*",), "models that the gate covers, by name; * and ? as in file names", group=_SCOPE
    )
    country: str = option("", "where callers are who send no X-Counsel-Country, such as US", group=_SCOPE)
    resources: str = option("", "file of crisis services instead of the shipped one", group=_SCOPE)
    texts: str = option("", "file of texts that replace shipped ones, by name", group=_SCOPE)
    window: PositiveInt = option(8, "last user turns of a conversation that are read", group=_DETECTION)
    detector_s: PositiveFloat = option(2.0, "longest time for one detection", group=_DETECTION)
    threshold_urgent: Share | None = option(
        None, "probability of imminent, active and self-harm together from which on it counts", group=_DETECTION
    )
    threshold_own: Share | None = option(None, "the same for these and passive", group=_DETECTION)
    threshold_any: Share | None = option(None, "the same for every risk, other-at-risk included", group=_DETECTION)
    guard_url: str = option("", "OpenAI-compatible endpoint of a guard model, with /v1", group=_GUARD)
    guard_model: str = option("", "the guard model's name there", group=_GUARD)
    guard_key_env: str = option("", "environment variable that holds its key", group=_GUARD)
    guard_system: str = option("", "system prompt for it; Llama Guard and Granite Guardian need none", group=_GUARD)
    guard_unsafe: str = option(r"\bunsafe\b", "an answer in which this pattern is found means a risk", group=_GUARD)
    guard_safe: str = option(r"\bsafe\b", "otherwise, one in which this is found means none", group=_GUARD)
    guard_s: PositiveFloat = option(2.0, "longest time for its answer", group=_GUARD)
    disclosure_every_h: NonNegativeFloat = option(
        3.0, "hours after which a conversation is told again that it talks to an AI; 0: only at its start",
        group=_DISCLOSURE,
    )  # fmt: skip
    disclosure_in_answer: Annotated[str, Literal["never", "asked", "always"]] = option(
        "asked", "when the answer itself says so, and not the header alone", group=_DISCLOSURE
    )
    webhook_url: str = option("", "address that is told of a risk; none by default", group=_ESCALATION)
    webhook_labels: tuple[str, ...] = option(("imminent",), "risks that it is told of", group=_ESCALATION)
    webhook_s: PositiveFloat = option(2.0, "longest time for one call of it", group=_ESCALATION)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.country and not re.fullmatch("[A-Z]{2}", self.country):
            raise UserError(f"country is {self.country!r}; it must be two capital letters such as US")
        for url in filter(None, (self.guard_url, self.webhook_url)):
            checked_url(url)
        if bool(self.guard_url) != bool(self.guard_model):
            raise UserError("guard_url and guard_model must be given together")
        if unknown := set(self.webhook_labels) - set(RISKS):
            raise UserError(f"webhook_labels has {min(unknown)!r}; allowed: {', '.join(RISKS)}")
        for name in ("guard_unsafe", "guard_safe"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise UserError(f"{name} is not a regular expression: {error}") from error

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that replace the detector's calibrated ones, by its names for them."""
        own = {"urgent": self.threshold_urgent, "own": self.threshold_own, "any": self.threshold_any}
        return {name: value for name, value in own.items() if value is not None}

    def read_texts(self) -> Texts:
        """The texts and services of this policy. Raises UserError where a file is not as it must be."""
        resources = read_resources(Path(self.resources) if self.resources else SHIPPED_RESOURCES)
        return read_texts(Path(self.texts) if self.texts else None, resources)

    @property
    def digest(self) -> str:
        """12 hex digits that name this policy with its texts and services."""
        texts = self.read_texts()
        content = repr((self, sorted(texts.templates.items()), tuple(texts.resources)))
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def read_policy(safety: str) -> Policy | None:
    """The policy that `--safety` names: None for `off`, the shipped one for `on`, else a YAML file's.

    Raises UserError for a file that cannot be read, an unknown key, or texts and services that are not as they must be.
    """
    if safety == OFF:
        return None
    policy = load_config(Policy, None if safety == ON else safety, {})
    folder = Path(safety).parent
    named = {name: str(folder / value) for name in ("resources", "texts") if (value := getattr(policy, name))}
    policy = dataclasses.replace(policy, **named)  # type: ignore[arg-type]
    policy.read_texts()
    return policy
