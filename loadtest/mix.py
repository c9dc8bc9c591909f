"""Which model each request is for: pure functions from a mix and a seed to model names.

Real traffic over adapters is skewed: a few are hot, most are cold. `zipf(a)` gives the model of rank r the weight
1/r^a; `zipf(0)` is uniform. Rank is the order of the list of models.
"""

from collections.abc import Sequence

import numpy as np

from counsel.errors import UserError
from counsel.values import nearest
from loadtest.distributions import parse

MIXES = {"uniform": "uniform", "zipf": "zipf(A)", "weights": "weights(NAME=W, ...)"}


def shares(mix: str, models: Sequence[str], base: str | None, base_share: float | None) -> dict[str, float]:
    """The share of requests of each model; they add up to 1.

    `base_share` is the share of the base (one of `models`); the mix divides the rest among the adapters. If it is None,
    the base is one model among the others.
    """
    call = parse("mix", mix, MIXES)
    divided = [model for model in models if base_share is None or model != base]
    if base_share is not None and base not in models:
        raise UserError(
            f"base_share is {base_share:g}, but the models {', '.join(models)} do not include the base; leave it out"
        )
    if call.name == "weights":
        for name in call.named:
            if name not in models:
                raise UserError(f"mix names the model {name!r}, which is not in this run; {nearest(name, models)}")
        weights = [call.named.get(model, 0.0) for model in divided]
    elif call.name == "zipf":
        if len(call.numbers) != 1 or call.numbers[0] < 0:
            raise UserError(f"mix is {mix!r}; the form is zipf(A), with A of 0 or more")
        weights = [(rank + 1) ** -call.numbers[0] for rank in range(len(divided))]
    else:
        weights = [1.0] * len(divided)
    rest = 1.0 if base_share is None else 1.0 - base_share
    total = sum(weights)
    if rest > 0 and (total <= 0 or min(weights) < 0):
        raise UserError(f"mix is {mix!r}; it gives no share to any of {', '.join(models)}; give one a weight above 0")
    result = {model: rest * weight / total for model, weight in zip(divided, weights, strict=True)} if rest > 0 else {}
    if base is not None and base_share is not None:
        result[base] = base_share
    return {model: result.get(model, 0.0) for model in models}


def choose_models(shares_by_model: dict[str, float], n: int, seed: int) -> list[str]:
    """Draw `n` models independently, by their shares."""
    random = np.random.default_rng([seed, 2])
    names = list(shares_by_model)
    weights = np.array([shares_by_model[name] for name in names])
    picks = random.choice(len(names), size=n, p=weights / weights.sum())
    return [names[pick] for pick in picks]


def with_cold_requests(
    models: Sequence[str], adapters: Sequence[str], cold_share: float, seed: int
) -> list[tuple[str, bool]]:
    """Send a share of the requests to the least recently used adapter; return each model, and whether it is cold.

    A bounded cache has most likely evicted that adapter, so the request pays for a load.
    """
    cold = np.random.default_rng([seed, 3]).random(len(models)) < cold_share
    last_use = dict.fromkeys(adapters, -1)
    chosen = []
    for index, model in enumerate(models):
        is_cold = bool(cold[index]) and bool(adapters)
        if is_cold:
            model = min(last_use, key=lambda name: last_use[name])
        if model in last_use:
            last_use[model] = index
        chosen.append((model, is_cold))
    return chosen
