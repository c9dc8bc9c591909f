"""Load-test a LoRA server with Locust: open-loop arrivals, skewed adapter mixes, per-request rows, verdicts."""
