"""The CPU LoRA arithmetic inside vLLM's real engine, on a tiny random Llama in float32, against PEFT."""

import contextlib
import os

import pytest

from tests.greedy import greedy_ids
from tests.tiny import tiny_adapter, tiny_base

pytestmark = pytest.mark.slow  # an engine of its own: a minute

QUESTIONS = ("i feel lonely", "work is hard since we moved", "what can help me sleep", "talk to me")
TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
N_TOKENS = 12


def asked(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama and three adapters that also change its vocabulary projection, each with another rank."""
    folder = tmp_path_factory.mktemp("llama")
    base = tiny_base(folder / "base", kind="llama")
    paths = [tiny_adapter(base, folder / f"a{rank}", seed=rank, rank=rank, targets=TARGETS) for rank in (4, 8, 2)]
    return base, paths


@contextlib.contextmanager
def engine_of(base, **options):
    """An engine in a process of its own. Both slots are taken by two adapters: none is empty when base rows come by."""
    vllm = pytest.importorskip("vllm")
    with pytest.MonkeyPatch.context() as kept:
        # vLLM preloads its OpenMP for every child of this process; later tests start servers of their own.
        kept.setenv("LD_PRELOAD", os.environ.get("LD_PRELOAD", ""))
        # To ask the engine's process which adapter stands in which slot.
        kept.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        if options.get("enforce_eager"):
            # Whatever asks for a compiler ends the engine, as on a machine without one.
            kept.setenv("CXX", "/nowhere/g++")
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


def said(engine, model, picks, prompt_logprobs=None):
    """Greedy answers, one for each (question, adapter number or None), all in one batch."""
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
    wanted = [None if pick is None else LoRARequest(f"a{pick}", pick + 1, str(paths[pick])) for _, pick in picks]
    sampling = SamplingParams(
        temperature=0, max_tokens=N_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=prompt_logprobs
    )
    return engine.generate(prompts, sampling, lora_request=wanted, use_tqdm=False)


def values(logprobs):
    return [sorted((token, entry.logprob) for token, entry in step.items()) for step in logprobs if step]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert [value for _, value in one] == pytest.approx([value for _, value in other], abs=2e-3)


def test_a_mixed_batch_says_what_peft_says_for_each(engine, model):
    """Base and both adapters in one batch: each greedy answer is that of transformers or PEFT in float32."""
    assert_answers_are_pefts(engine, model)


def test_with_a_worker_of_ones_own_answers_are_right(model):
    """A worker that does not make the layers known to compiled code gets none: vLLM's --worker-cls goes on working."""
    with engine_of(model[0], worker_cls="vllm.v1.worker.cpu_worker.CPUWorker") as started:
        assert_answers_are_pefts(started, model)


def assert_answers_are_pefts(engine, model):
    base, paths = model
    picks = [(question, pick) for question in QUESTIONS for pick in (None, 0, 1)]
    for (question, pick), output in zip(picks, said(engine, model, picks), strict=True):
        expected = greedy_ids(base, None if pick is None else paths[pick], asked(question), N_TOKENS)
        assert list(output.outputs[0].token_ids) == expected, (question, pick)


def test_base_answers_are_the_same_alone_and_mixed(engine, model):
    """The base's log-probabilities do not depend on which adapters share its batch."""
    alone = said(engine, model, [(question, None) for question in QUESTIONS])
    mixed = said(engine, model, [(question, pick) for question in QUESTIONS for pick in (0, None, 1)])[1::3]
    for one, other in zip(alone, mixed, strict=True):
        assert_same(values(one.outputs[0].logprobs), values(other.outputs[0].logprobs))


def test_prompt_log_probabilities_of_several_requests_are_each_requests_own(engine, model):
    """What crashes stock vLLM on Llama models: prompt_logprobs of requests that run together with adapters."""
    picks = list(zip(QUESTIONS, (None, 0, 1, 0), strict=True))
    together = said(engine, model, picks, prompt_logprobs=3)
    for pick, output in zip(picks, together, strict=True):
        (alone,) = said(engine, model, [pick], prompt_logprobs=3)
        assert_same(values(alone.prompt_logprobs), values(output.prompt_logprobs))


def in_slots(worker, *needed):
    """The number of the adapter in each slot once a step has these, by name, number and path. Runs in the engine."""
    from vllm.lora.request import LoRARequest

    manager = worker.model_runner.lora_manager
    manager.set_active_adapters({LoRARequest(*adapter) for adapter in needed}, None)
    return list(manager._adapter_manager.lora_index_to_id)


def test_adapters_in_use_keep_their_slots(engine, model):
    """Reading a third adapter takes neither of two slots; a step that needs it takes the one that it does not need."""
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
    for (question, pick), output in zip(picks, said(engine, model, picks), strict=True):
        assert list(output.outputs[0].token_ids) == greedy_ids(base, paths[pick], asked(question), N_TOKENS)


def spoil(worker):
    """Write NaN over all key-value memory: the worst that can be left there by requests that ended. In the engine."""
    for cache in worker.model_runner.kv_caches:
        cache.fill_(float("nan"))


def test_what_is_left_in_memory_reaches_no_answer(engine, model):
    """With NaN in every block that no request holds, each answer is still PEFT's, prompt rows too."""
    picks = [(question, pick) for question in QUESTIONS for pick in (None, 0, 1)]
    clean = said(engine, model, picks[:4], prompt_logprobs=3)
    engine.collective_rpc(spoil)
    for one, other in zip(clean, said(engine, model, picks[:4], prompt_logprobs=3), strict=True):
        assert_same(values(one.prompt_logprobs), values(other.prompt_logprobs))
    engine.collective_rpc(spoil)
    assert_answers_are_pefts(engine, model)


@pytest.fixture(scope="module")
def huge(model, tmp_path_factory):
    """An adapter whose weights are finite, and whose products are not."""
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
    """Beside it, and after it in the memory that it leaves, the base and a good adapter answer as ever."""
    base, paths = model
    crowd = [(question, pick) for question in QUESTIONS for pick in (None, 0, 3)]
    outputs = said(engine, (base, [*paths, huge]), crowd)
    for (question, pick), output in zip(crowd, outputs, strict=True):
        if pick == 3:
            assert (output.outputs[0].finish_reason, list(output.outputs[0].token_ids)) == ("error", [])
        else:
            expected = greedy_ids(base, None if pick is None else paths[pick], asked(question), N_TOKENS)
            assert list(output.outputs[0].token_ids) == expected, (question, pick)
    assert_answers_are_pefts(engine, model)


def frames(worker):
    """How much torch has compiled or looked at for it so far. Runs in the engine."""
    import torch

    return dict(torch._dynamo.utils.counters["frames"])


def test_no_request_compiles_anything(engine, model):
    """Every way to sample, asked for the first time: what is not compiled when the engine is ready never is."""
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
