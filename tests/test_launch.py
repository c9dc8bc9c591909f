"""The launch plan is a pure function of config, base, hardware and store."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from counsel.catalog import Base
from counsel.errors import UserError
from counsel.processor import Processor, described
from serve import vllm_api
from serve.config import ServeConfig
from serve.cpu import plugin
from serve.hardware import Gpu, Hardware, detect
from serve.launch import PLUGINS, gateway_flags, plan
from train import hardware
from train.recipe import Recipe

GIB = 1 << 30
NEW = Processor("AMD EPYC", "AVX512-BF16", bf16=True)
SMALL = Hardware("cpu", (0, 1), 24 * GIB, NEW, compiler="g++", openmp=Path("/venv/lib/libiomp5.so"))
LARGE = Hardware("cpu", tuple(range(32)), 256 * GIB, NEW, tcmalloc=Path("/usr/lib/libtcmalloc_minimal.so.4"))
GPU = Hardware("cuda", tuple(range(16)), 128 * GIB, NEW, gpus=(Gpu("NVIDIA L4", 24 * GIB, (8, 9)),))


@pytest.fixture
def base(tmp_path):
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
             "max_position_embeddings": 8192, "vocab_size": 49152}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return Base("small", "org/small", "apache-2.0", tmp_path)


def flag(made, name):
    """The last value of a flag: the one vLLM's parser keeps."""
    places = [i for i, word in enumerate(made.argv) if word == name]
    return made.argv[places[-1] + 1] if places else None


def test_a_small_cpu_uses_every_core_and_preloads_what_is_there(base):
    """Both cores compute, OpenMP is preloaded, and glibc replaces a missing tcmalloc, which the reason names."""
    made = plan(ServeConfig(), base, SMALL, environ={})
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert made.env["LD_PRELOAD"] == "/venv/lib/libiomp5.so"
    assert made.env["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert made.env["COUNSEL_CPU_EXECUTOR"] == "uni"
    assert made.env["MALLOC_MMAP_THRESHOLD_"] == "33554432"
    assert "apt install libtcmalloc-minimal4" in made.explain()
    assert made.argv[1:3] == ("-m", "serve.api_process")
    # 64 requests x 1024 tokens x 30 layers x 3 heads x 64 values x key and value x 2 bytes
    assert flag(made, "--kv-cache-memory-bytes") == str(64 * 1024 * 30 * 3 * 64 * 2 * 2)
    assert flag(made, "--max-model-len") == "4096"


def test_memory_for_a_large_vocabulary_is_kept_between_steps(base):
    """Sorting 64 requests' scores of 262,144 tokens takes 64 x 262,144 x 8 bytes, which glibc must keep."""
    config = base.path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 262_144}))
    assert plan(ServeConfig(), base, SMALL, environ={}).env["MALLOC_MMAP_THRESHOLD_"] == "134217728"


def test_a_large_cpu_leaves_a_core_free_and_preloads_tcmalloc(base):
    """With more than four cores vLLM binds the threads; tcmalloc is preloaded and glibc keeps its settings."""
    made = plan(ServeConfig(), base, LARGE, environ={})
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    assert made.env["LD_PRELOAD"] == "/usr/lib/libtcmalloc_minimal.so.4"
    assert not any(name.startswith("MALLOC_") for name in made.env)


@pytest.mark.parametrize("environ", [{"LD_PRELOAD": "/lib/libgomp.so.1"}, {"VLLM_CPU_OMP_THREADS_BIND": "1"}])
def test_no_engine_is_forked_if_it_would_hang_or_bind_wrongly(base, environ):
    """GCC's OpenMP does not survive a fork, and Intel's then ignores the chosen cores."""
    made = plan(ServeConfig(), base, SMALL, environ=environ)
    assert not {"VLLM_WORKER_MULTIPROC_METHOD", "COUNSEL_CPU_EXECUTOR"} & made.env.keys()
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in plan(ServeConfig(), base, replace(SMALL, openmp=None), environ={}).env


def test_without_a_compiler_the_model_stays_eager(base):
    """Models compile by default, but not with --no-compile, nor without g++, which the reason says how to install."""
    assert "--enforce-eager" not in plan(ServeConfig(), base, SMALL, environ={}).argv
    assert "--enforce-eager" in plan(ServeConfig(compile=False), base, SMALL, environ={}).argv
    without = plan(ServeConfig(), base, replace(SMALL, compiler=None), environ={})
    assert "--enforce-eager" in without.argv
    assert "apt install g++" in without.explain()


def test_a_gpu_gets_no_cpu_setting(base):
    """On CUDA: no CPU flag, no preload, vLLM's own scheduler. tests/test_plan.py has the rest."""
    made = plan(ServeConfig(), base, GPU, environ={})
    assert flag(made, "--block-size") is flag(made, "--kv-cache-memory-bytes") is flag(made, "--scheduler-cls") is None
    assert "--enable-lora" in made.argv
    of_all = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "VLLM_ENFORCE_STRICT_TOOL_CALLING", "VLLM_HOST_IP", "GLOO_SOCKET_IFNAME"}
    assert set(made.env) == {"VLLM_PLUGINS", "VLLM_NO_USAGE_STATS", "LLGUIDANCE_LOG_LEVEL", *of_all}


def test_several_ranks_on_a_cpu_share_its_cores(base):
    """Copies and splits each get their own cores and their part of the memory; more ranks than cores are refused."""
    made = plan(ServeConfig(data_parallel_size=2), base, SMALL, environ={})
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "0|1"
    assert "COUNSEL_CPU_EXECUTOR" not in made.env
    assert (flag(made, "--data-parallel-size"), flag(made, "--tensor-parallel-size")) == ("2", None)
    # 32 requests in each copy x 1024 tokens x 30 layers x 3 heads x 64 values x key and value x 2 bytes
    assert (flag(made, "--max-num-seqs"), flag(made, "--kv-cache-memory-bytes")) == (
        "32",
        str(32 * 1024 * 30 * 3 * 64 * 4),
    )
    made = plan(ServeConfig(tensor_parallel_size=3), base, replace(SMALL, cpus=tuple(range(4, 10))), environ={})
    assert made.env["VLLM_CPU_OMP_THREADS_BIND"] == "4,7|5,8|6,9"
    with pytest.raises(UserError, match="needs 4 cores; there are 2"):
        plan(ServeConfig(tensor_parallel_size=2, data_parallel_size=2), base, SMALL)
    with pytest.raises(UserError, match="needs a GPU"):
        plan(ServeConfig(quantization="fp8"), base, SMALL)


def test_fewer_adapters_in_memory_than_the_default_slots(base):
    """--max-cpu-loras alone bounds the slots too, and --max-loras alone raises the other."""
    few, many = plan(ServeConfig(max_cpu_loras=4), base, SMALL), plan(ServeConfig(max_loras=100), base, SMALL)
    assert [flag(made, name) for made in (few, many) for name in ("--max-loras", "--max-cpu-loras")] == [
        "4",
        "4",
        "100",
        "100",
    ]


# The first core of each, cut to what differs.
HASWELL = "processor\t: 0\nmodel name\t: Intel(R) Core(TM) i7-4770\nflags\t\t: fpu sse2 avx f16c avx2 fma\n"
SKYLAKE = "model name\t: Intel(R) Xeon(R) Gold 6148\nflags\t\t: fpu avx avx2 avx512f avx512bw avx512vl\n"
ZEN4 = "model name\t: AMD EPYC 9R14\nflags\t\t: fpu avx avx2 avx512f avx512_vnni avx512_bf16\n"
SAPPHIRE = "model name\t: Intel(R) Xeon(R) 8488C\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n"
NEOVERSE_N1 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes fphp asimdhp asimddp\nCPU part\t: 0xd0c\n"
NEOVERSE_V1 = "processor\t: 0\nFeatures\t: fp asimd sve asimdfhm svebf16 i8mm bf16\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("cpuinfo", "dtype", "why"),
    [
        (HASWELL, "float32", "i7-4770 (AVX2) has no bfloat16"),
        (SKYLAKE, "float32", "6148 (AVX-512 without BF16) has no bfloat16"),
        (ZEN4, "bfloat16", "AMD EPYC 9R14 (AVX512-BF16) multiplies bfloat16"),
        (SAPPHIRE, "bfloat16", "8488C (AMX) multiplies bfloat16"),
        (NEOVERSE_N1, "float32", "(Arm without BF16) has no bfloat16"),
        (NEOVERSE_V1, "bfloat16", "(SVE with BF16) multiplies bfloat16"),
        ("", "float32", "has no bfloat16"),
    ],
    ids=["avx2", "avx512", "avx512_bf16", "amx", "arm", "arm_bf16", "unknown"],
)
def test_the_processor_chooses_the_arithmetic_of_serving_and_training(base, monkeypatch, cpuinfo, dtype, why):
    """bfloat16 if the hardware multiplies it, else float32, with the reason. Training there chooses the same."""
    here = described(cpuinfo)
    made = plan(ServeConfig(), base, replace(SMALL, processor=here), environ={})
    assert flag(made, "--dtype") == dtype
    (reason,) = (line for line in made.explain().splitlines() if "--dtype" in line)
    assert why in reason
    # 64 requests x 1024 tokens x 30 layers x 3 heads x 64 values x key and value
    assert flag(made, "--kv-cache-memory-bytes") == str(64 * 1024 * 30 * 3 * 64 * 2 * (4 if dtype == "float32" else 2))

    pytest.importorskip("torch")
    monkeypatch.setattr(hardware, "processor", lambda: here)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trains = hardware.detect_training_hardware()
    assert hardware.choose_precision(Recipe(), trains).dtype == dtype
    assert str(here) in trains.name


def test_dtype_wins_and_a_quantized_base_keeps_its_own(base):
    """--dtype wins over the processor, and the kernels of a quantized base choose for themselves."""
    old = replace(SMALL, processor=described(HASWELL))
    assert flag(plan(ServeConfig(dtype="bfloat16"), base, old, environ={}), "--dtype") == "bfloat16"
    config = base.path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "awq"}}))
    assert flag(plan(ServeConfig(), base, old, environ={}), "--dtype") == "auto"


def test_a_base_too_large_for_float32_stays_in_bfloat16(base):
    """10 GiB of weights would take 20 of 24 GiB in float32, so the base stays in bfloat16, with the reason."""
    with (base.path / "model.safetensors").open("wb") as file:
        file.truncate(10 * GIB)
    old = replace(SMALL, processor=described(HASWELL))
    made = plan(ServeConfig(), base, old, environ={})
    assert flag(made, "--dtype") == "bfloat16"
    assert "float32 would fill 20 of 24 GiB" in made.explain()


def test_how_long_an_adapter_may_wait_reaches_the_scheduler(base):
    """--adapter-wait-s is where serve/scheduler.py reads it, on a CPU and a GPU."""
    for machine in (SMALL, GPU):
        made = plan(ServeConfig(adapter_wait_s=0.5), base, machine, environ={})
        assert json.loads(flag(made, "--additional-config")) == {"adapter_wait_s": 0.5}


def test_every_choice_can_be_overridden(base):
    """A config field, a vLLM flag in vllm_args and a variable that is already set each win, with the reason."""
    config = ServeConfig(max_num_seqs=7, kv_cache_memory_gb=0.5, max_model_len=512, vllm_args="--block-size 64")
    set_by_user = {"VLLM_CPU_OMP_THREADS_BIND": "1", "LD_PRELOAD": "/mine.so"}
    made = plan(config, base, SMALL, environ=set_by_user)
    assert flag(made, "--max-num-seqs") == "7"
    assert flag(made, "--kv-cache-memory-bytes") == "500000000"
    assert flag(made, "--max-model-len") == "512"
    assert flag(made, "--block-size") == "64"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in made.env
    assert made.env["LD_PRELOAD"] == "/venv/lib/libiomp5.so:/mine.so"
    assert "VLLM_CPU_OMP_THREADS_BIND=1: set in your environment" in made.explain()
    assert "LD_PRELOAD" not in plan(config, base, SMALL, environ={"LD_PRELOAD": "/lib/libgomp.so.1"}).env


def test_an_adapter_above_the_largest_rank_is_reported(base):
    """The plan warns of rank 100 in the store with max_lora_rank 64, and names the next rank that vLLM allows."""
    for rank in (100, 128):
        assert "start with --max-lora-rank 128" in plan(ServeConfig(), base, SMALL, (16, rank), environ={}).explain()


def test_the_plan_is_what_vllm_understands(base):
    """vLLM's own parser accepts the whole command line."""
    pytest.importorskip("vllm")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serve.vllm_api import make_arg_parser

    targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    config = ServeConfig(vllm_args="--seed 3")
    made = plan(config, base, SMALL, (16,), targets, environ={})
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args([*made.argv[3:], *gateway_flags(config)])
    assert tuple(parsed.lora_target_modules) == targets
    assert (parsed.max_loras, parsed.max_lora_rank, parsed.block_size, parsed.seed) == (8, 64, 32, 3)


def test_plugins_are_installed_under_the_names_the_plan_allows():
    """Each name in VLLM_PLUGINS is an entry point of this project."""
    from importlib.metadata import entry_points

    groups = ("vllm.platform_plugins", "vllm.general_plugins", "vllm.endpoint_plugins")
    assert {point.name for group in groups for point in entry_points(group=group)} >= set(PLUGINS)


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [
        ("counsel_platform", "counsel_platform,counsel_log_privacy"),
        ("counsel_log_privacy,counsel_adapters", None),
    ],
)
def test_a_choice_of_plugins_keeps_requests_out_of_the_log(base, asked, loaded):
    """Whoever sets VLLM_PLUGINS may leave out a plugin, but not the one that keeps the log free of callers' words."""
    made = plan(ServeConfig(), base, SMALL, environ={"VLLM_PLUGINS": asked})
    assert made.env.get("VLLM_PLUGINS") == loaded


def test_this_machine_is_detected():
    """At least one core, some memory and a known device."""
    machine = detect()
    assert machine.cpus
    assert machine.memory_bytes > GIB // 4
    assert machine.device in ("cpu", "cuda")


def test_a_vllm_that_was_not_tested_keeps_its_own_path_with_a_warning(monkeypatch, caplog):
    """With an untested version, vLLM keeps its own platform, and a warning says what that means."""
    pytest.importorskip("vllm")
    if not vllm_api.vllm_is_cpu_build():
        pytest.skip("a CUDA build keeps its own platform anyway")
    assert plugin.register() == "serve.cpu.platform.CounselCpuPlatform"
    monkeypatch.setattr(vllm_api, "TESTED", {"cpu": ("9.9",)})
    with caplog.at_level("WARNING", logger="vllm.counsel"):
        assert plugin.register() is None
    assert "this project was tested with 9.9.x only" in caplog.text


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_wait_that_is_not_positive_is_refused(seconds):
    """Turns without a length would swap adapters at every step."""
    with pytest.raises(UserError, match="adapter_wait_s is"):
        ServeConfig(adapter_wait_s=seconds)


@pytest.mark.parametrize(
    ("endpoint", "protocol"), [("http://127.0.0.1:4317", "grpc"), ("http://c:4318/v1/traces", "http/protobuf")]
)
def test_traces_go_to_the_collector_by_its_protocol(base, endpoint, protocol):
    """As vLLM's own option and OpenTelemetry's own variable say it; neither is there without an endpoint."""
    made = plan(ServeConfig(otlp_traces_endpoint=endpoint), base, detect(), environ={})
    assert made.argv[made.argv.index("--otlp-traces-endpoint") + 1] == endpoint
    assert made.env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == protocol
    made = plan(ServeConfig(), base, detect(), environ={})
    assert "--otlp-traces-endpoint" not in made.argv
    assert not [name for name in made.env if name.startswith("OTEL")]


def test_traces_without_their_packages_or_a_url_are_refused(base, monkeypatch):
    """In one line, before anything starts."""
    with pytest.raises(UserError, match=r"otlp_traces_endpoint is '127\.0\.0\.1:4317'; it must be like http://"):
        plan(ServeConfig(otlp_traces_endpoint="127.0.0.1:4317"), base, detect())
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"opentelemetry.sdk.trace is not installed; pip install") as raised:
        plan(ServeConfig(otlp_traces_endpoint="http://127.0.0.1:4317"), base, detect())
    assert "\n" not in str(raised.value)
