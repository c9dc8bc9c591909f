"""The CPU LoRA arithmetic inside vLLM's real engine, on a tiny random Llama in float32, against PEFT."""

import contextlib
import os

import pytest

from tests.greedy import greedy_ids
from tests.tiny import tiny_adapter, tiny_base

pytestmark = pytest.mark.slow  # a separate engine: a minute

QUESTIONS = ("i feel lonely", "work is hard since we moved", "what can help me sleep", "talk to me")
TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
N_TOKENS = 12


def asked(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama and three adapters of different ranks that also change its vocabulary projection."""
    folder = tmp_path_factory.mktemp("llama")
    base = tiny_base(folder / "base", kind="llama")
    paths = [tiny_adapter(base, folder / f"a{rank}", seed=rank, rank=rank, targets=TARGETS) for rank in (4, 8, 2)]
    return base, paths


@contextlib.contextmanager
def engine_of(base, **options):
    """An engine in its own process, with two slots, so that two adapters leave none empty for base rows."""
    vllm = pytest.importorskip("vllm")
    with pytest.MonkeyPatch.context() as kept:
        # vLLM preloads its OpenMP for every child of this process, and later tests start servers.
        kept.setenv("LD_PRELOAD", os.environ.get("LD_PRELOAD", ""))
        # Lets collective_rpc run a function of this module in the engine's process.
        kept.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        if options.get("enforce_eager"):
            # A compile ends the engine, as on a machine without a compiler.
            kept.setenv("CXX", "/nowhere/g++")
        else:
            # An eager engine of this module may still be running, with its setting in force.
            kept.delenv("CXX", raising=False)
        started = vllm.LLM(
            str(base), dtype="float32", enable_lora=True, max_loras=2, max_cpu_loras=3, max_lora_rank=8,
            max_model_len=256, max_num_seqs=16, kv_cache_memory_bytes=64 << 20, block_size=32,
            enable_prefix_caching=False, **options,
        )  # fmt: skip
        yield started
        started.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module", params=["compiled", "eager"])
def engine(model, request):
    with engine_of(model[0], enforce_eager=request.param == "eager") as started:
        yield started


def answers(engine, model, picks, prompt_logprobs=None):
    """Greedy answers, one per (question, adapter index or None), all in one batch."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    base, paths = model
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [
        tokenizer.apply_chat_template(asked(question), tokenize=False, add_generation_prompt=True)
        for question, _ in picks
    ]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False).input_ids} for text in texts]
    adapters = [None if pick is None else LoRARequest(f"a{pick}", pick + 1, str(paths[pick])) for _, pick in picks]
    sampling = SamplingParams(
        temperature=0, max_tokens=N_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=prompt_logprobs
    )
    return engine.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)


def values(logprobs):
    return [sorted((token, entry.logprob) for token, entry in step.items()) for step in logprobs if step]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [value for _, value in one] == pytest.approx([value for _, value in other], abs=2e-3)


def test_each_answer_of_a_mixed_batch_is_pefts(engine, model):
    """Base and two adapters in one batch: each greedy answer equals transformers or PEFT in float32."""
    assert_answers_are_pefts(engine, model)


def test_with_another_worker_answers_are_right(model):
    """A worker that does not register layers gets no compiled code, so vLLM's --worker-cls still works."""
    with engine_of(model[0], worker_cls="vllm.v1.worker.cpu_worker.CPUWorker") as started:
        assert_answers_are_pefts(started, model)


def assert_answers_are_pefts(engine, model):
    base, paths = model
    picks = [(question, pick) for question in QUESTIONS for pick in (None, 0, 1)]
    for (question, pick), output in zip(picks, answers(engine, model, picks), strict=True):
        expected = greedy_ids(base, None if pick is None else paths[pick], asked(question), N_TOKENS)
        assert list(output.outputs[0].token_ids) == expected, (question, pick)


def test_base_answers_are_the_same_alone_and_mixed(engine, model):
    """The base's log-probabilities do not depend on the adapters in its batch."""
    alone = answers(engine, model, [(question, None) for question in QUESTIONS])
    mixed = answers(engine, model, [(question, pick) for question in QUESTIONS for pick in (0, None, 1)])[1::3]
    for one, other in zip(alone, mixed, strict=True):
        assert_same(values(one.outputs[0].logprobs), values(other.outputs[0].logprobs))


def test_prompt_log_probabilities_of_several_requests_are_each_requests_own(engine, model):
    """prompt_logprobs of requests that run together with adapters, which crash stock vLLM on Llama models."""
    picks = list(zip(QUESTIONS, (None, 0, 1, 0), strict=True))
    together = answers(engine, model, picks, prompt_logprobs=3)
    for pick, output in zip(picks, together, strict=True):
        (alone,) = answers(engine, model, [pick], prompt_logprobs=3)
        assert_same(values(alone.prompt_logprobs), values(output.prompt_logprobs))


def in_slots(worker, *adapters):
    """The adapter id in each slot after a step with these adapters (name, id, path). Runs in the engine."""
    from vllm.lora.request import LoRARequest

    manager = worker.model_runner.lora_manager
    manager.set_active_adapters({LoRARequest(*adapter) for adapter in adapters}, None)
    return list(manager._adapter_manager.lora_index_to_id)


def test_adapters_in_use_keep_their_slots(engine, model):
    """Loading a third adapter takes neither slot. A step that needs it takes the slot that the step does not need."""
    from vllm.lora.request import LoRARequest

    base, paths = model
    first, second, third = ((f"a{n}", n + 1, str(path)) for n, path in enumerate(paths))
    (before,) = engine.collective_rpc(in_slots, args=(first, second))
    assert sorted(before) == [1, 2]
    engine.llm_engine.add_lora(LoRARequest(*third))
    assert engine.collective_rpc(in_slots) == [before]
    for stays in (first, second):
        (before,) = engine.collective_rpc(in_slots, args=(first, second))
        (after,) = engine.collective_rpc(in_slots, args=(third, stays))
        assert after == [number if number == stays[1] else 3 for number in before]
    picks = [(question, pick) for question in QUESTIONS for pick in (0, 2)]
    for (question, pick), output in zip(picks, answers(engine, model, picks), strict=True):
        assert list(output.outputs[0].token_ids) == greedy_ids(base, paths[pick], asked(question), N_TOKENS)


def spoil(worker):
    """Fill all key-value memory with NaN, the worst that finished requests can leave. Runs in the engine."""
    for cache in worker.model_runner.kv_caches:
        cache.fill_(float("nan"))


def test_what_is_left_in_memory_reaches_no_answer(engine, model):
    """With NaN in every free block, each answer still equals PEFT's, prompt rows included."""
    picks = [(question, pick) for question in QUESTIONS for pick in (None, 0, 1)]
    clean = answers(engine, model, picks[:4], prompt_logprobs=3)
    engine.collective_rpc(spoil)
    for one, other in zip(clean, answers(engine, model, picks[:4], prompt_logprobs=3), strict=True):
        assert_same(values(one.prompt_logprobs), values(other.prompt_logprobs))
    engine.collective_rpc(spoil)
    assert_answers_are_pefts(engine, model)


@pytest.fixture(scope="module")
def huge(model, tmp_path_factory):
    """An adapter with finite weights whose products overflow."""
    from safetensors.torch import load_file, save_file

    base, _ = model
    folder = tiny_adapter(base, tmp_path_factory.mktemp("huge") / "huge", seed=7, rank=8)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name, values_ in weights.items():
        if "lora_B" in name:
            weights[name] = values_.float().fill_(3e38)
    save_file(weights, file)
    return folder


def test_a_request_that_overflows_ends_alone_with_an_error(engine, model, huge):
    """The base and a good adapter answer as before, next to it and later in its memory."""
    base, paths = model
    crowd = [(question, pick) for question in QUESTIONS for pick in (None, 0, 3)]
    outputs = answers(engine, (base, [*paths, huge]), crowd)
    for (question, pick), output in zip(crowd, outputs, strict=True):
        if pick == 3:
            assert (output.outputs[0].finish_reason, list(output.outputs[0].token_ids)) == ("error", [])
        else:
            expected = greedy_ids(base, None if pick is None else paths[pick], asked(question), N_TOKENS)
            assert list(output.outputs[0].token_ids) == expected, (question, pick)
    assert_answers_are_pefts(engine, model)


def frames(worker):
    """How many frames torch has compiled or examined so far. Runs in the engine."""
    import torch

    return dict(torch._dynamo.utils.counters["frames"])


def test_no_request_compiles_anything(engine, model):
    """The first request of each sampling option: nothing compiles after the engine is ready."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    before = engine.collective_rpc(frames)
    ways = (
        {}, {"seed": 3}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.5, "seed": 3}, {"min_p": 0.1}, {"n": 3},
        {"logprobs": 0}, {"logprobs": 20}, {"prompt_logprobs": 3}, {"temperature": 0, "logprobs": 1},
        {"repetition_penalty": 1.3}, {"frequency_penalty": 1, "presence_penalty": 1}, {"logit_bias": {5: 9}},
        {"allowed_token_ids": [5, 6]}, {"bad_words": ["lonely"]}, {"min_tokens": 3}, {"stop": ["e"]},
        {"structured_outputs": StructuredOutputsParams(choice=["yes", "no"])},
    )  # fmt: skip
    prompts = [{"prompt_token_ids": [*range(5, 5 + length)]} for length in range(3, 3 + len(ways))]
    for prompt, way in zip(prompts, ways, strict=True):
        engine.generate([prompt], SamplingParams(max_tokens=4, **way), use_tqdm=False)
    sampling = [SamplingParams(max_tokens=4, **way) for way in ways]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} <= {"stop", "length"}
    assert engine.collective_rpc(frames) == before
