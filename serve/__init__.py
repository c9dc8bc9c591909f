"""Serve one base model and many hot-loaded LoRA adapters from a vLLM OpenAI-compatible server."""
