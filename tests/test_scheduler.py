"""Adapters take turns in the slots: our scheduler on vLLM's real one, with a clock that the test sets."""

import os
import random
from itertools import count

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from serve.cpu.scheduler import CleanBlocksScheduler
from serve.launch import ADAPTER_WAIT_KEY
from serve.scheduler import AsyncTurnsScheduler, TurnsScheduler, make_scheduler
from tests.tiny import tiny_base

BLOCK = 32
STEP_S = 0.1
WAIT_S = 2.0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("scheduler") / "base", kind="llama")


@pytest.fixture
def engine_of(base, monkeypatch):
    """An engine without a model: requests pass a real scheduler, and each step gives each of them a token."""
    # vLLM sets up its CPU processes through this process's environment.
    monkeypatch.setenv("LD_PRELOAD", os.environ.get("LD_PRELOAD", ""))

    def make(cls, slots=2, running=16, blocks=400, **options):
        import torch

        config = EngineArgs(
            str(base), enable_lora=True, max_loras=slots, max_cpu_loras=32, max_num_seqs=running, block_size=BLOCK,
            max_model_len=512, enforce_eager=True, additional_config={ADAPTER_WAIT_KEY: WAIT_S}, dtype="float32",
            **options,
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        return Engine(cls, config, KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]))

    return make


class Engine:
    """Steps of `step_s` on its own clock. `first_s` maps each request to the time of its first token."""

    step_s = STEP_S

    def __init__(self, cls, config, kv_cache_config):
        self.now_s, self.counter = 0.0, count()
        self.first_s, self.n_tokens, self.asked_s, self.ended = {}, {}, {}, {}
        self.scheduler = cls(
            vllm_config=config, kv_cache_config=kv_cache_config, block_size=BLOCK, hash_block_size=BLOCK,
            log_stats=False, structured_output_manager=StructuredOutputManager(config),
        )  # fmt: skip
        self.scheduler.clock = lambda: self.now_s
        init_none_hash(hash)
        self.hasher = get_request_block_hasher(BLOCK, lambda value: repr(value).encode())

    def ask(self, adapter=None, tokens=20, prompt=8):
        """Ask the base, or the adapter with that id, for some tokens."""
        name = f"{adapter}-{next(self.counter)}"
        lora = LoRARequest(f"a{adapter}", adapter, "/nowhere") if adapter else None
        request = Request(
            name, [*range(5, 5 + prompt)], SamplingParams(max_tokens=tokens, ignore_eos=True), None, lora_request=lora,
            block_hasher=self.hasher,
        )  # fmt: skip
        self.asked_s[name] = self.now_s
        self.scheduler.add_request(request)
        return name

    def step(self, not_finite=()):
        """Run one step; returns the names of the requests in it."""
        planned = self.scheduler.schedule()
        names = list(planned.num_scheduled_tokens)
        self.now_s += self.step_s
        done = [
            name for name in names
            if self.scheduler.requests[name].num_computed_tokens >= self.scheduler.requests[name].num_tokens
        ]  # fmt: skip
        sampled = [[7] if name in done else [] for name in names]
        output = ModelRunnerOutput(
            names, {name: i for i, name in enumerate(names)}, sampled,
            num_nans_in_logits={name: int(name in not_finite) for name in names},
        )  # fmt: skip
        for outputs in self.scheduler.update_from_output(planned, output).values():
            for answer in outputs.outputs:
                if answer.new_token_ids:
                    self.first_s.setdefault(answer.request_id, self.now_s)
                    self.n_tokens[answer.request_id] = self.n_tokens.get(answer.request_id, 0) + len(
                        answer.new_token_ids
                    )
                if answer.finish_reason is not None:
                    self.ended[answer.request_id] = str(answer.finish_reason)
        return names

    def wait_s(self, name):
        return self.first_s[name] - self.asked_s[name]


def adapters_in(names):
    return {name.split("-")[0] for name in names} - {"None"}


def busy(engine, adapters, streams, tokens=20):
    """One step of a closed loop, in which each adapter always has `streams` requests."""
    for adapter in adapters:
        live = [name for name in engine.scheduler.requests if name.startswith(f"{adapter}-")]
        for _ in range(streams - len(live)):
            engine.ask(adapter, tokens)
    return engine.step()


@pytest.mark.parametrize("cls", [TurnsScheduler, CleanBlocksScheduler])
def test_next_to_busy_adapters_another_gets_its_turn(engine_of, cls):
    """Two adapters with endless answers hold both slots; each request of a third begins within the wait."""
    engine = engine_of(cls)
    for _ in range(30):
        busy(engine, (1, 2), streams=4)
    for _ in range(5):
        cold = engine.ask(3, tokens=4)
        while cold in engine.scheduler.requests:
            names = busy(engine, (1, 2), streams=4)
            assert len(adapters_in(names)) <= 2
        assert engine.wait_s(cold) <= WAIT_S
    # Paused answers continued: none was lost.
    assert set(engine.ended.values()) == {"length"}


@pytest.mark.parametrize("slots", [2, 8])
def test_turns_cost_busy_adapters_little(engine_of, slots):
    """24 streams fill the slots and one more adapter is asked every 2 s: it keeps its wait, at .95 of the tokens."""
    n_tokens, waits = [], []
    for due_s in (1e9, None):
        engine = engine_of(TurnsScheduler, slots=slots, running=32)
        engine.step_s = 0.02
        engine.scheduler.due_s = due_s or engine.scheduler.due_s
        cold, asks_s = [], 2.0
        while engine.now_s < 20:
            if engine.now_s >= asks_s and (not cold or cold[-1] in engine.ended):
                cold.append(engine.ask(slots + 1, tokens=4))
                asks_s = engine.now_s + 2.0
            busy(engine, range(1, slots + 1), streams=24 // slots, tokens=64)
        n_tokens.append(sum(engine.n_tokens.values()))
        waits.append([engine.wait_s(name) for name in cold if name in engine.first_s])
    assert n_tokens[1] >= 0.95 * n_tokens[0]
    assert len(waits[1]) >= 5
    assert max(waits[1]) <= WAIT_S


def test_without_turns_it_would_wait_forever(engine_of):
    """With an unreachable wait, vLLM's own rule applies: under the same load, no turn in 60 s."""
    engine = engine_of(TurnsScheduler)
    engine.scheduler.due_s = 1e9
    for _ in range(30):
        busy(engine, (1, 2), streams=4)
    cold = engine.ask(3)
    for _ in range(600):
        busy(engine, (1, 2), streams=4)
    assert cold not in engine.first_s


def test_long_answers_pause_and_end_complete(engine_of):
    """Three adapters with one long answer each share two slots. Each resumes within the wait, and no token is lost."""
    engine = engine_of(TurnsScheduler)
    names = [engine.ask(adapter, tokens=200) for adapter in (1, 2, 3)]
    last_s = dict.fromkeys(names, 0.0)
    while engine.scheduler.requests:
        stepped = engine.step()
        assert len(stepped) <= 2
        for name in stepped:
            assert engine.now_s - last_s[name] <= WAIT_S
            last_s[name] = engine.now_s
    assert {engine.n_tokens[name] for name in names} == {200}
    # 3 x 200 tokens, two at a time: no step was idle, except while the last answer runs alone.
    assert engine.now_s <= (3 * 200 / 2 + 2 * WAIT_S / STEP_S) * STEP_S


def test_with_more_adapters_than_slots_all_take_turns(engine_of):
    """Ten adapters that always have requests share two slots: all get similar numbers of tokens."""
    engine = engine_of(TurnsScheduler, running=32)
    for _ in range(600):
        busy(engine, range(1, 11), streams=2)
    by_adapter = dict.fromkeys(map(str, range(1, 11)), 0)
    for name, tokens in engine.n_tokens.items():
        by_adapter[name.split("-")[0]] += tokens
    assert min(by_adapter.values()) > 0.5 * max(by_adapter.values())


def test_the_base_never_waits_for_a_slot(engine_of):
    """While adapters wait for turns, a request for the base begins in the next step."""
    engine = engine_of(TurnsScheduler)
    for _ in range(30):
        busy(engine, (1, 2, 3), streams=4)
    asked = engine.ask()
    assert asked in busy(engine, (1, 2, 3), streams=4)


def test_the_adapter_that_waited_longest_gets_the_next_free_place(engine_of):
    """Two adapters hold all places and have more waiting: a third begins before those, once an answer ends."""
    engine = engine_of(TurnsScheduler, running=4)
    for _ in range(10):
        busy(engine, (1, 2), streams=8, tokens=30)
    cold = engine.ask(3, tokens=2)
    while cold in engine.scheduler.requests:
        busy(engine, (1, 2), streams=8, tokens=30)
    # At the latest when the answers that were running when it became due have ended.
    assert engine.wait_s(cold) <= WAIT_S + 30 * STEP_S


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_an_adapter_that_waits_for_a_place_does_not_stop_the_turns(engine_of, slots):
    """Long answers of twice as many adapters as slots fill all places, and two more adapters wait for a place.

    No answer pauses longer than the wait, and the first waiting adapter begins once an answer ends.
    """
    engine = engine_of(TurnsScheduler, slots=slots, running=2 * slots)
    names = [engine.ask(adapter, tokens=100 + 20 * adapter) for adapter in range(1, 2 * slots + 1)]
    while len(engine.scheduler.running) < len(names):
        engine.step()
    cold = [engine.ask(2 * slots + 1, tokens=5), engine.ask(2 * slots + 2, tokens=5)]
    last_s = dict.fromkeys(names, engine.now_s)
    first_end_s = None
    while engine.scheduler.requests:
        stepped = engine.step()
        for name in set(names) & set(stepped):
            assert engine.now_s - last_s[name] <= WAIT_S
            last_s[name] = engine.now_s
        if first_end_s is None and engine.ended:
            first_end_s = engine.now_s
    assert engine.first_s[cold[0]] <= first_end_s + 2 * STEP_S
    assert set(engine.ended.values()) == {"length"}


def test_with_little_memory_every_request_still_ends(engine_of):
    """With one slot and memory for two answers, all adapters with long prompts still finish."""
    engine = engine_of(TurnsScheduler, slots=1, blocks=8)
    names = [engine.ask(adapter, tokens=40, prompt=64) for adapter in (1, 2, 3, 1, 2, 3)]
    for _ in range(3000):
        engine.step()
        if not engine.scheduler.requests:
            break
    assert set(engine.ended) == set(names)


@pytest.mark.parametrize("seed", [9, 11])
def test_with_few_places_and_little_memory_the_engine_is_never_idle(engine_of, seed):
    """Paused answers hold memory that the next request needs: meanwhile they continue, and all end."""
    chance = random.Random(seed)
    engine = engine_of(TurnsScheduler, slots=2, running=7, blocks=14)
    idle_steps = 0
    for step in range(3000):
        if step < 400 and chance.random() < 0.25:
            adapter = chance.choice([None, *range(1, 9)])
            engine.ask(adapter, tokens=chance.choice([2, 5, 30, 80]), prompt=chance.choice([8, 64]))
        waiting = len(engine.scheduler.requests)
        idle_steps += bool(waiting) and not engine.step()
        if step >= 400 and not engine.scheduler.requests:
            break
    assert not engine.scheduler.requests
    # One step may pass after an adapter that entered found no memory.
    assert idle_steps <= 5


def test_one_adapter_enters_a_slot_per_step(engine_of):
    """Of two adapters asked at once, the second begins one step later. The base does not wait."""
    engine = engine_of(TurnsScheduler)
    names = [engine.ask(1), engine.ask(2), engine.ask()]
    assert engine.step() == [names[0], names[2]]
    assert set(engine.step()) == set(names)


@pytest.mark.parametrize("cls", [TurnsScheduler, CleanBlocksScheduler])
def test_a_request_without_finite_scores_ends_alone(engine_of, cls):
    """It ends with an error and no further token; other requests continue, and its memory is free again."""
    engine = engine_of(cls)
    free = engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    good, bad = engine.ask(1), engine.ask(2)
    for _ in range(4):
        engine.step()
    before = engine.n_tokens[bad]
    engine.step(not_finite=[bad])
    assert (engine.ended, engine.n_tokens[bad]) == ({bad: "error"}, before)
    while engine.scheduler.requests:
        engine.step()
    assert engine.ended == {bad: "error", good: "length"}
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_a_new_block_is_cleared_first(engine_of):
    """The scheduler reports every block of every request in the step that first uses it."""
    engine = engine_of(CleanBlocksScheduler)
    name = engine.ask(1, tokens=100, prompt=40)
    reported = []
    while name in engine.scheduler.requests:
        planned = engine.scheduler.schedule()
        held = {
            block.block_id
            for block in engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks[name]
        }
        reported += planned.new_block_ids_to_zero or []
        assert held <= set(reported)
        engine.scheduler.update_from_output(planned, ModelRunnerOutput([name], {name: 0}, [[7]]))
    assert len(reported) == -(-139 // BLOCK)


def test_the_scheduler_is_asynchronous_where_vllms_would_be(engine_of):
    """With asynchronous scheduling, vLLM's default on a GPU, ours extends vLLM's asynchronous scheduler."""
    assert type(engine_of(make_scheduler).scheduler) is TurnsScheduler
    engine = engine_of(lambda **options: make_scheduler(**_asynchronous(options)))
    assert type(engine.scheduler) is AsyncTurnsScheduler
    assert isinstance(engine.scheduler, AsyncTurnsScheduler.__mro__[2])
    for _ in range(30):
        busy(engine, (1, 2), streams=4)
    cold = engine.ask(3, tokens=4)
    while cold in engine.scheduler.requests:
        busy(engine, (1, 2), streams=4)
    assert engine.wait_s(cold) <= WAIT_S


def _asynchronous(options):
    options["vllm_config"].scheduler_config.async_scheduling = True
    return options
