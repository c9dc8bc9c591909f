"""Load-test a LoRA server with Locust: open-loop arrivals, skewed adapter mixes, one record per request, a verdict."""
