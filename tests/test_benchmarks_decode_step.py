"""The results of `make bench-step`: a trace of three steps computed by hand, and a page of metrics."""

from benchmarks.decode_step import by_kind, steps_in


def span(name, start_us, length_us):
    return {"name": name, "ts": start_us, "dur": length_us}


def test_a_trace_becomes_milliseconds_per_step_by_kind():
    """An operator's time excludes what it calls, waiting counts as elsewhere, and the last, cut step is ignored."""
    step = (
        span("execute_context_0(0)_generation_1(1)", 0, 8000),
        span("## Call CompiledFxGraph x ##", 1000, 5000),
        span("_C::onednn_mm", 1500, 2000),
        span("vllm::counsel_lora_linear", 4000, 1000),
        span("aten::item", 4200, 300),
        span("vllm::unified_attention_with_output", 6200, 1000),
        span("_C::cpu_attention_with_kv_cache", 6300, 600),
        # Sampling comes after the model's span; then nothing until the next step at 10,000 us.
        span("aten::argmax", 8500, 500),
    )
    trace = [{**event, "ts": event["ts"] + at} for at in (0, 10_000, 20_000) for event in step]
    found = by_kind(trace[::-1])

    # compiled: 5 less 2 and 1 inside it; python: 8 less 5 and 1, and the attention's 1 less 0.6.
    assert found == {
        "matmul": 2.0, "lora": 0.7, "attention": 0.6, "compiled": 2.0, "torch": 0.8, "python": 2.4, "elsewhere": 1.5,
    }  # fmt: skip
    assert sum(found.values()) == 10.0


def test_steps_are_counted_over_all_engines():
    """Only the histogram's count is taken, of each engine, and no other series."""
    page = """\
# HELP vllm:iteration_tokens_total Histogram of number of tokens per engine_step.
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf"} 7.0
vllm:iteration_tokens_total_count{engine="0"} 7.0
vllm:iteration_tokens_total_sum{engine="0"} 99.0
vllm:iteration_tokens_total_count{engine="1"} 5.0
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} 80.0
"""

    assert steps_in(page) == 12.0
