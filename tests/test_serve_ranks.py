"""A server whose model runs in two processes, on two CPU cores: two copies, or one copy split in two."""

import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from counsel import store as adapter_store
from counsel.client import make_client
from serve.server import Server
from tests.conftest import tiny_config
from tests.greedy import greedy_ids
from tests.tiny import tiny_adapter
from tests.waiting import until

ASK = [{"role": "user", "content": "i feel lonely since we moved"}]
N_TOKENS, N_EACH = 8, 8


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each process needs a core")
@pytest.mark.parametrize("option", ["data_parallel_size", "tensor_parallel_size"])
def test_two_processes_answer_with_every_adapter_as_peft_does(tiny_model, tmp_path, option):
    """Those published before the start and while it runs; each is resident once, and stopping waits for both.

    Requests go to both copies, so an adapter that one of them lacked would be answered as the base.
    """
    config = tiny_config(tmp_path, tiny_model.path, **{option: 2})
    store = Path(config.store)
    sources = {name: tiny_adapter(tiny_model.path, tmp_path / name, seed=n) for n, name in enumerate("abc", 1)}
    for name in "ab":
        adapter_store.publish(store, name, sources[name], tiny_model, system="")
    expected = {name: greedy_ids(tiny_model.path, source, ASK, N_TOKENS) for name, source in sources.items()}
    expected[tiny_model.name] = greedy_ids(tiny_model.path, None, ASK, N_TOKENS)

    with Server(config, quiet=True) as server:
        client = make_client(server.base_url)

        def ask(model: str) -> list[int]:
            reply = client.chat.completions.create(
                model=model, messages=ASK, max_tokens=N_TOKENS, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            return reply.choices[0].token_ids

        def page() -> str:
            with urllib.request.urlopen(server.base_url.removesuffix("/v1") + "/metrics") as reply:
                return reply.read().decode()

        adapter_store.publish(store, "c", sources["c"], tiny_model, system="")
        until(lambda: any(model.id == "c" for model in client.models.list()))
        asked = list(expected) * N_EACH
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, asked))
        assert answers == [expected[model] for model in asked]

        served = re.findall(r'vllm:request_success_total{engine="(.)",finished_reason="length".*} (\S+)', page())
        assert [engine for engine, count in served if float(count)] == (["0", "1"] if option[0] == "d" else ["0"])
        resident = re.findall(r'counsel_adapter_resident{adapter="(.)@.*} (\S+)', page())
        assert sorted(resident) == [("a", "1.0"), ("b", "1.0"), ("c", "1.0")]
        counted = re.findall(r'counsel_requests_total{adapter="(\w+)[@"].*status="200"} (\S+)', page())
        assert dict(counted) == dict.fromkeys(expected, f"{N_EACH}.0")

        adapter_store.remove(store, "a")
        until(lambda: 'adapter="a@' not in "".join(re.findall("counsel_adapter_resident.*", page())))
        process = server.process
    assert process is not None
    assert process.returncode == 0
