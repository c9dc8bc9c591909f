"""The launch plan for GPUs, without one: every combination by itself, a sample through vLLM's parser and config."""

import itertools
import json
import re
from importlib.metadata import PackageNotFoundError

import pytest

from counsel.catalog import Base
from counsel.errors import UserError
from counsel.processor import Processor
from serve import accelerators, hardware, quantization
from serve.__main__ import main
from serve.config import GPU_QUANTIZATIONS, ServeConfig
from serve.gpu_plan import GIB
from serve.hardware import Gpu, Hardware, visible_gpus
from serve.launch import gateway_flags, plan
from serve.model_shape import read_shape
from tests.fake_gpus import configs_of

GB = 10**9
COUNTS, MEMORIES_GB = (1, 2, 4, 8), (16, 24, 40, 80, 141)
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def llama(hidden, inner, layers, heads, kv_heads, vocabulary, tied, **more):
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 131072,
        "tie_word_embeddings": tied, **more,
    }  # fmt: skip


# The published configs, and the published numbers of parameters in millions.
BASES = {
    "smollm2-135m": (llama(576, 1536, 30, 9, 3, 49152, True, max_position_embeddings=8192), 134.5),
    "llama-1b": (llama(2048, 8192, 16, 32, 8, 128256, True), 1236),
    "gemma-2-2b": (
        llama(2304, 9216, 26, 8, 4, 256000, True, architectures=["Gemma2ForCausalLM"], model_type="gemma2",
              head_dim=256, max_position_embeddings=8192), 2614),
    "qwen3-4b": (
        llama(2560, 9728, 36, 32, 8, 151936, True, architectures=["Qwen3ForCausalLM"], model_type="qwen3",
              head_dim=128, max_position_embeddings=40960), 4022),
    "llama-8b": (llama(4096, 14336, 32, 32, 8, 128256, False), 8030),
    "gemma-2-9b": (
        llama(3584, 14336, 42, 16, 8, 256000, True, architectures=["Gemma2ForCausalLM"], model_type="gemma2",
              head_dim=256, max_position_embeddings=8192), 9242),
    "qwen3-32b": (
        llama(5120, 25600, 64, 64, 8, 151936, False, architectures=["Qwen3ForCausalLM"], model_type="qwen3",
              head_dim=128, max_position_embeddings=40960), 32762),
    "llama-70b": (llama(8192, 28672, 80, 64, 8, 128256, False), 70554),
}  # fmt: skip
QWEN_MOE = llama(2048, 6144, 48, 32, 4, 151936, False, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe",
                 head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """config -> a base's folder that holds nothing but that."""

    def folder_of(config):
        folder = tmp_path_factory.mktemp("base")
        (folder / "config.json").write_text(json.dumps(config))
        return Base("base", "org/base", "unknown", folder)

    return folder_of


def gpus(count, gb, capability, host_gb=512):
    card = Gpu("described", int(gb * GB), capability)
    return Hardware("cuda", tuple(range(16)), host_gb * GB, Processor("x", None, bf16=True), gpus=(card,) * count)


def value(made, name):
    """The last value of a flag, as vLLM's parser reads it; None without the flag."""
    places = [i for i, word in enumerate(made.argv) if word == name]
    return made.argv[places[-1] + 1] if places else None


def number(made, name):
    return int(value(made, name))


def why(made, name):
    (found,) = (reason.why for reason in made.reasons if reason.choice.startswith(name))
    return found


@pytest.mark.parametrize("name", BASES)
def test_parameters_are_counted_as_published(folders, name):
    config, millions = BASES[name]
    shape = read_shape(folders(config).path)
    assert shape.parameters / 1e6 == pytest.approx(millions, rel=0.005)


def test_sizes_by_hand(folders):
    """Llama-3.1-8B: 128 KiB per token, and 41,943,040 numbers in an adapter of rank 16 on all linear layers."""
    shape = read_shape(folders(BASES["llama-8b"][0]).path)
    assert shape.kv_bytes() == 2 * 2 * 32 * 8 * 128 == 131072
    assert [shape.kv_bytes(tensor_parallel=n) for n in (2, 8, 16)] == [65536, 16384, 16384]
    assert shape.adapter_bytes(16) == 2 * 41_943_040
    assert shape.slot_bytes(16) == shape.adapter_bytes(16)
    # Column-parallel layers split B and copy A; row-parallel layers (o_proj, down_proj) the other way round. vLLM sees
    # o_proj's output and q_proj's output, 4096 numbers both, as one or the other; the sum is the same.
    split = 4096 + 2 * 1024 + 2 * 14336 + 4096 + 14336
    copied = 5 * 4096 + 2 * 4096
    assert shape.slot_bytes(16, 2) == 2 * 16 * 32 * (split // 2 + copied)


def every_plan(folders):
    """Every base on every machine: (what, plan or None where it is refused, reason of the refusal)."""
    for name, (config, _) in BASES.items():
        base = folders(config)
        for count, gb, capability in itertools.product(COUNTS, MEMORIES_GB, CAPABILITIES):
            try:
                yield (name, count, gb, capability), plan(ServeConfig(), base, gpus(count, gb, capability), (8, 24)), ""
            except UserError as error:
                yield (name, count, gb, capability), None, str(error)


def test_every_plan_fits_or_says_why_not(folders):
    """Weights, slots, and one longest request's keys and values fit in 92 % of each GPU; adapters fit in the host."""
    planned = refused = 0
    for (name, count, gb, capability), made, reason in every_plan(folders):
        config, millions = BASES[name]
        shape = read_shape(folders(config).path)
        no_dtype = capability < (8, 0) and config["model_type"] == "gemma2"
        if made is None:
            refused += 1
            smallest = 2e6 * millions / count
            assert ("has no bfloat16, gemma2 overflows" in reason) if no_dtype else ("does not fit" in reason), reason
            assert no_dtype or smallest > 0.5 * gb * GB, (name, count, gb)
            continue
        planned += 1
        assert not no_dtype
        tensor, data = number(made, "--tensor-parallel-size"), number(made, "--data-parallel-size")
        context, rank = number(made, "--max-model-len"), number(made, "--max-lora-rank")
        slots, host = number(made, "--max-loras"), number(made, "--max-cpu-loras")
        assert value(made, "--dtype") == ("float16" if capability < (8, 0) else "bfloat16")
        assert tensor * data == count
        assert config["num_attention_heads"] % tensor == 0
        # 24 is no rank that vLLM allows; 32 is the next.
        assert (rank, 1 <= slots <= 8, slots <= host <= 64) == (32, True, True)
        used = 2e6 * millions / tensor + slots * shape.slot_bytes(rank, tensor)
        used += context * shape.kv_bytes(tensor_parallel=tensor)
        assert used < 0.92 * gb * GB, (name, count, gb)
        assert host == slots or host * count * shape.adapter_bytes(rank) < 512 * GB / 2
        assert 1 <= number(made, "--max-num-seqs") <= 256
        assert "--enable-prefix-caching" in made.argv
        assert value(made, "--scheduler-cls") is None
        # A copy is not split where half as many GPUs have room for it twice over.
        if tensor > 1:
            assert 2e6 * millions / (tensor // 2) > 0.3 * gb * GB, (name, count, gb)
    assert planned > 600
    assert refused > 100


def test_more_memory_never_plans_for_less(folders):
    """From 16 to 141 GB: no fewer slots, no shorter context, no more GPUs per copy; a plan stays a plan."""
    for name, (config, _) in BASES.items():
        base = folders(config)
        for count in COUNTS:
            last = (0, 0, -(10**9))
            for gb in MEMORIES_GB:
                try:
                    made = plan(ServeConfig(), base, gpus(count, gb, (8, 0)))
                except UserError:
                    assert last[0] == 0, (name, count, gb)
                    continue
                context, tensor = number(made, "--max-model-len"), number(made, "--tensor-parallel-size")
                now = (context * number(made, "--max-loras"), context, -tensor)
                assert now[0] >= last[0], (name, count, gb)
                assert now[1] >= last[1], (name, count, gb)
                last = now


def test_reasons_are_those_of_a_gpu(folders):
    """Rank costs time there; copies or a split for what it is; the scheduler and its waiting time say what they do."""
    base = folders(BASES["llama-8b"][0])
    copies = plan(ServeConfig(), base, gpus(2, 80, (9, 0)), (8, 16))
    assert (value(copies, "--tensor-parallel-size"), value(copies, "--data-parallel-size")) == ("1", "2")
    assert "15.0 GiB of weights and the adapter slots fit on one GPU" in why(copies, "--tensor-parallel-size")
    assert "every adapter is loaded into each" in why(copies, "--data-parallel-size")
    split = plan(ServeConfig(), base, gpus(2, 16, (8, 0)), ())
    assert (value(split, "--tensor-parallel-size"), value(split, "--data-parallel-size")) == ("2", "1")
    assert "do not fit on one GPU of 15 GiB" in why(split, "--tensor-parallel-size")
    assert why(copies, "--max-lora-rank").startswith(
        "serves the store's largest, 16: on a GPU every adapter is computed"
    )
    assert "the store is empty" in why(split, "--max-lora-rank")
    assert "no time" not in copies.explain()
    assert "(adapter_wait_s does nothing)" in copies.explain()
    assert "no bfloat16" in why(plan(ServeConfig(), base, gpus(4, 16, (7, 5))), "--dtype")


def test_what_is_set_is_kept_or_refused(folders):
    """Each option of ours wins over the plan's choice; what cannot be is refused with what is allowed."""
    base = folders(BASES["llama-8b"][0])
    eight = gpus(8, 80, (9, 0))
    config = ServeConfig(tensor_parallel_size=4, max_loras=3, max_cpu_loras=5, max_lora_rank=128, max_model_len=999,
                         max_num_seqs=7, kv_cache_memory_gb=2, dtype="float16")  # fmt: skip
    made = plan(config, base, eight, (16,))
    names = ("tensor-parallel-size", "data-parallel-size", "max-loras", "max-cpu-loras", "max-lora-rank",
             "max-model-len", "max-num-seqs", "kv-cache-memory-bytes", "dtype")  # fmt: skip
    assert [value(made, f"--{name}") for name in names] == [
        "4",
        "1",
        "3",
        "5",
        "128",
        "999",
        "7",
        "2000000000",
        "float16",
    ]
    assert "4 of 8 GPUs stay unused: as asked" in why(made, "--data-parallel-size")
    made = plan(ServeConfig(data_parallel_size=3), base, eight)
    assert (value(made, "--tensor-parallel-size"), value(made, "--data-parallel-size")) == ("1", "3")
    for refused, words in (
        ({"tensor_parallel_size": 16}, "needs 16 GPUs; there are 8"),
        ({"tensor_parallel_size": 4, "data_parallel_size": 4}, "needs 16 GPUs"),
        ({"tensor_parallel_size": 3}, "32 attention heads do not divide by 3"),
        ({"dtype": "float32"}, "adapter kernels for GPUs do not take"),
        ({"vllm_args": "--tensor-parallel-size 2"}, "as an option of its own"),
        ({"vllm_args": "-dp 2"}, "as an option of its own"),
        ({"vllm_args": "--quantization=bitsandbytes"}, "bitsandbytes, which was not checked"),
        ({"max_model_len": 10**7}, "no context of 10000000 tokens fits"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            plan(ServeConfig(**refused), base, eight)
    with pytest.raises(UserError, match=r"bfloat16, which a GPU of compute capability 7\.5 does not have"):
        plan(ServeConfig(dtype="bfloat16"), base, gpus(8, 24, (7, 5)))
    with pytest.raises(UserError, match=r"compute capability 7\.0; vLLM needs 7\.5"):
        plan(ServeConfig(), base, gpus(1, 32, (7, 0)))
    with pytest.raises(UserError, match="float16, in which gemma2 overflows"):
        plan(ServeConfig(dtype="float16"), folders(BASES["gemma-2-2b"][0]), eight)


def test_odd_numbers_of_gpus_and_unequal_ones(folders):
    """A copy takes a power of two; of unequal cards the weakest decides."""
    large = folders(BASES["llama-70b"][0])
    made = plan(ServeConfig(), large, gpus(6, 80, (9, 0)))
    assert (value(made, "--tensor-parallel-size"), value(made, "--data-parallel-size")) == ("4", "1")
    assert "2 of 6 GPUs stay unused" in why(made, "--data-parallel-size")
    machine = gpus(2, 80, (9, 0))
    mixed = Hardware(**{**vars(machine), "gpus": (machine.gpus[0], Gpu("t4", 16 * GB, (7, 5)))})
    made = plan(ServeConfig(), folders(BASES["llama-8b"][0]), mixed)
    assert (value(made, "--dtype"), value(made, "--tensor-parallel-size")) == ("float16", "2")


def test_a_mixture_of_experts_shares_all_gpus_and_an_unknown_config_is_left_to_vllm(folders):
    made = plan(ServeConfig(), folders(QWEN_MOE), gpus(4, 80, (9, 0)))
    assert (value(made, "--tensor-parallel-size"), value(made, "--data-parallel-size")) == ("4", "1")
    assert "wait for each other at every step" in why(made, "--tensor-parallel-size")
    made = plan(ServeConfig(), folders({"model_type": "gpt2", "n_embd": 768}), gpus(2, 24, (8, 9)))
    assert value(made, "--gpu-memory-utilization") is value(made, "--max-model-len") is None
    assert "vLLM finds what fits" in made.explain()


def compressed(format_name, bits, kind, strategy):
    """The `quantization_config` of a base in compressed-tensors' files."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}
    weights |= {"group_size": 16 if kind == "float" else 128} if "group" in strategy else {}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": format_name, "config_groups": groups, "ignore": ["lm_head"]}


# What a quantized base's config.json says, and the lowest capability at which it is served; None: never.
QUANTIZED = {
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, (7, 5)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, (7, 5)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}, (7, 5)),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []}, (7, 5)),
    "modelopt-fp8": ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": []}, (8, 0)),
    "float-quantized": (compressed("float-quantized", 8, "float", "channel"), (7, 5)),
    "nvfp4-pack-quantized": (compressed("nvfp4-pack-quantized", 4, "float", "tensor_group"), (7, 5)),
    "pack-quantized": (compressed("pack-quantized", 4, "int", "group"), (7, 5)),
    "gguf": ({"quant_method": "gguf"}, None),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, None),
}


def test_quantized_bases_are_served_where_vllm_has_kernels(folders):
    """Refused before the start elsewhere; the reason says whether the card multiplies the format."""
    for name, (quantized, lowest) in QUANTIZED.items():
        base = folders({**BASES["llama-8b"][0], "quantization_config": quantized})
        for capability in CAPABILITIES:
            machine = gpus(1, 80, capability)
            if lowest is None or capability < lowest:
                with pytest.raises(UserError, match=name if lowest is None else "needs a GPU of compute capability"):
                    plan(ServeConfig(), base, machine)
                continue
            made = plan(ServeConfig(), base, machine)
            eight, four = ("fp8", "modelopt-fp8", "float-quantized"), ("nvfp4", "nvfp4-pack-quantized")
            native = (8, 9) if name in eight else (10, 0) if name in four else (7, 5)
            assert ("saves memory only" in why(made, "quantized base")) == (capability < native)
    base = folders({**BASES["llama-8b"][0], "quantization_config": QUANTIZED["awq"][0]})
    with pytest.raises(UserError, match="the base's own files are AWQ"):
        plan(ServeConfig(quantization="fp8"), base, gpus(1, 80, (9, 0)))
    with pytest.raises(UserError, match="mixture of experts in FP8"):
        plan(ServeConfig(quantization="fp8"), folders(QWEN_MOE), gpus(8, 80, (9, 0)))
    halved = plan(ServeConfig(quantization="fp8"), folders(BASES["llama-8b"][0]), gpus(1, 16, (8, 9)))
    assert value(halved, "--quantization") == "fp8"
    assert set(GPU_QUANTIZATIONS) == set(quantization.ON_LOAD)


def sample(folders):
    """(what, machine, plan) of each base, each machine size, each capability and each format at least once."""
    for i, (name, (config, _)) in enumerate(BASES.items()):
        base = folders(config)
        for j, capability in enumerate(CAPABILITIES):
            count, gb = COUNTS[(i + j) % 4], MEMORIES_GB[(i + 2 * j) % 5]
            try:
                made = plan(ServeConfig(), base, gpus(count, gb, capability), (8, 24))
            except UserError:
                continue
            yield name, (count, gb, capability), base, made
    for name, (quantized, lowest) in QUANTIZED.items():
        base = folders({**BASES["llama-8b"][0], "quantization_config": quantized})
        for capability in CAPABILITIES[::2]:
            if lowest is not None and capability >= lowest:
                yield name, (2, 40, capability), base, plan(ServeConfig(), base, gpus(2, 40, capability))
    for asked in GPU_QUANTIZATIONS:
        base = folders(BASES["llama-8b"][0])
        yield asked, (1, 80, (9, 0)), base, plan(ServeConfig(quantization=asked), base, gpus(1, 80, (9, 0)))


def test_vllm_runs_with_what_the_plan_says(folders, tmp_path):
    """vLLM's own parser and config, told of such GPUs: every value arrives, and every refusal of ours is one of its.

    LoRA's CUDA graphs come in two kinds, the prefix cache is on, the scheduler is vLLM's, and adapters have the base's
    dtype.
    """
    pytest.importorskip("vllm")
    planned = list(sample(folders))
    cases = [
        {"gpus": count, "gb": gb, "capability": capability, "argv": [*made.argv[3:], *gateway_flags(ServeConfig())]}
        for _, (count, gb, capability), _, made in planned
    ]

    def refused(gb, capability, config, *flags):
        argv = ["--model", str(folders(config).path), "--enable-lora", "--max-model-len", "512", *flags]
        return {"gpus": 4, "gb": gb, "capability": capability, "argv": argv}

    llama_8b = BASES["llama-8b"][0]
    theirs = {
        "bfloat16 on 7.5": refused(16, (7, 5), llama_8b, "--dtype", "bfloat16"),
        "gemma2 in float16": refused(80, (9, 0), BASES["gemma-2-2b"][0], "--dtype", "float16"),
        "bitsandbytes": refused(80, (9, 0), {**llama_8b, "quantization_config": QUANTIZED["bitsandbytes"][0]}),
        "gguf": refused(80, (9, 0), {**llama_8b, "quantization_config": QUANTIZED["gguf"][0]}),
        "fbgemm_fp8": refused(80, (9, 0), {**llama_8b, "quantization_config": QUANTIZED["fbgemm_fp8"][0]}),
        "modelopt FP8 on 7.5": refused(80, (7, 5), {**llama_8b, "quantization_config": QUANTIZED["modelopt-fp8"][0]}),
        "32 heads over 3": refused(80, (9, 0), llama_8b, "--tensor-parallel-size", "3"),
    }  # fmt: skip
    alone = refused(16, (7, 5), BASES["gemma-2-2b"][0])
    *answers, left_to_itself = configs_of([*cases, *theirs.values(), alone], tmp_path)
    # Why gemma2 is refused on 7.5: vLLM would choose this, which its adapter kernels do not take.
    assert left_to_itself["dtype"] == "float32"
    for (name, machine, _, made), got in zip(planned, answers, strict=False):
        assert "error" not in got, (name, machine, got)
        flags = ("tensor-parallel-size", "data-parallel-size", "max-loras", "max-cpu-loras", "max-lora-rank",
                 "max-model-len", "max-num-seqs")  # fmt: skip
        keys = ("tensor", "data", "max_loras", "max_cpu_loras", "max_lora_rank", "max_model_len", "max_num_seqs")
        assert [got[key] for key in keys] == [number(made, f"--{flag}") for flag in flags], (name, machine)
        assert got["dtype"] == got["lora_dtype"] == value(made, "--dtype"), (name, machine)
        assert got["api_processes"] == 1
        assert (got["prefix_cache"], got["scheduler"], got["eager"]) == (True, None, False), (name, machine)
        assert got["graphs"] != "NONE"
        assert got["specialize_lora"] is True
        # The plan's estimate counts on these two.
        assert got["memory_share"] == 0.92
        assert got["step_tokens"] <= (8192 if machine[1] * GB >= 70 * GIB else 2048)
        assert (got["quantization"] is not None) == (name in (*QUANTIZED, *GPU_QUANTIZATIONS))
    for (what, _), got in zip(theirs.items(), answers[len(cases) :], strict=True):
        assert "error" in got, (what, got)


SMI = "0, GPU-aa11, NVIDIA A10, 23028, 8.6\n1, GPU-ab22, Tesla T4, 15360, 7.5\n"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA A10", "Tesla T4"]),
        ("1", ["Tesla T4"]),
        ("1,0", ["Tesla T4", "NVIDIA A10"]),
        ("GPU-ab", ["Tesla T4"]),
        ("0,7,1", ["NVIDIA A10"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch, visible, names):
    """Their memory and capability, and only those that CUDA_VISIBLE_DEVICES leaves, in its order."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<END\n{SMI}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = visible_gpus()
    assert [gpu.name for gpu in found] == names
    assert all(gpu in (Gpu("NVIDIA A10", 23028 << 20, (8, 6)), Gpu("Tesla T4", 15360 << 20, (7, 5))) for gpu in found)


def test_slices_of_a_gpu_and_one_that_shares_the_hosts_memory(tmp_path, monkeypatch):
    """A MIG slice has the memory of its profile; an integrated GPU has none of its own."""
    smi = tmp_path / "nvidia-smi"
    whole = "GPU 0: NVIDIA A100 (UUID: GPU-aa)\n  MIG 3g.20gb     Device  0: (UUID: MIG-11)\n"
    whole += "  MIG 1g.5gb      Device  1: (UUID: MIG-22)\n"
    query = "0, GPU-aa, NVIDIA A100, 40960, 8.0\n1, GPU-bb, NVIDIA GB10, [N/A], 12.1"
    smi.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then cat <<END\n{whole}END\nelse cat <<END\n{query}\nEND\nfi\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-22,MIG-11")
    assert [(gpu.memory_bytes, gpu.capability) for gpu in visible_gpus()] == [(5 * GB, (8, 0)), (20 * GB, (8, 0))]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_gpus() == (Gpu("NVIDIA GB10", hardware.detect().memory_bytes, (12, 1)),)


def test_an_old_driver_and_a_failing_one(tmp_path, monkeypatch):
    """A driver that hides the capability is reported; one that finds no GPU means none."""
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    smi.write_text("#!/bin/sh\necho '0, GPU-1, Tesla K80, 11441, [N/A]'\n")
    smi.chmod(0o755)
    with pytest.raises(UserError, match="update the NVIDIA driver"):
        visible_gpus()
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == ()


@pytest.mark.parametrize(
    ("versions", "device"),
    [
        ({"vllm": "0.33.0+rocm720"}, "rocm"),
        ({"vllm": "0.33.0+xpu"}, "xpu"),
        ({"vllm": "0.33.0", "tpu-inference": "0.33.0"}, "tpu"),
        ({"vllm-tpu": "0.33.0"}, "tpu"),
        ({"vllm": "0.32.0", "vllm-metal": "0.3.0"}, "metal"),
    ],
)
def test_other_accelerators_are_passed_through_or_refused(folders, monkeypatch, versions, device):
    """By the vLLM that is installed: where its own sources have adapter kernels, what was asked for goes through."""

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(hardware.importlib.metadata, "version", version)
    monkeypatch.setattr(hardware, "visible_gpus", lambda: ())
    machine = hardware.detect()
    assert machine.device == device
    base = folders(BASES["llama-8b"][0])
    if device in accelerators.REFUSED:
        with pytest.raises(UserError, match="adapters were not checked"):
            plan(ServeConfig(), base, machine)
        return
    made = plan(ServeConfig(tensor_parallel_size=2, max_loras=3), base, machine, environ={})
    assert (value(made, "--tensor-parallel-size"), value(made, "--max-loras"), value(made, "--dtype")) == (
        "2",
        "3",
        "auto",
    )
    assert value(made, "--max-num-seqs") is value(made, "--data-parallel-size") is None
    assert not any(name.startswith(("VLLM_CPU", "LD_PRELOAD", "MALLOC")) for name in made.env)
    assert "never run by this project" in made.explain()


def test_the_command_plans_for_a_described_machine(folders, tmp_path, capsys):
    """`serve plan` needs config.json alone, prints each choice with its reason, and ends in JSON."""
    folder = str(folders(BASES["llama-8b"][0]).path)
    machine = ["--gpus", "2", "--gpu-gb", "80", "--gpu-capability", "9.0", "--store", str(tmp_path)]
    assert main(["plan", "--model", folder, *machine]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert "on 2 x 80 GB, compute capability 9.0" in out
    assert "GPU path: plan and API checked, never run" in out
    assert "  --data-parallel-size 2: 2 copies answer different requests" in out
    assert document["gpus"] == 2
    assert {"choice": "--max-loras 8"}.items() <= document["choices"][3].items()
    assert document["flags"][document["flags"].index("--dtype") + 1] == "bfloat16"
    for words, message in (
        (["--gpus", "2"], "--gpu-gb and --gpu-capability together"),
        (["--gpus", "1", "--gpu-gb", "80", "--gpu-capability", "9"], "such as 8.0 or 12.0"),
        (["--gpus", "0", "--gpu-gb", "80"], "gpus is 0"),
        (["--gpus", "1", "--gpu-gb", "8", "--gpu-capability", "8.6"], "does not fit"),
    ):
        assert main(["plan", "--model", folder, "--store", str(tmp_path), *words]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
    assert main(["plan", "--model", folder, "--store", str(tmp_path), "--gpus", "0"]) == 0
    assert "--max-num-batched-tokens" in capsys.readouterr().out
