"""Load-test a LoRA server with Locust: open-loop arrivals, skewed adapter mixes, a record per request, a verdict."""
