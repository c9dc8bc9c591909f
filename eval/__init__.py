"""Evaluate base and adapters on held-out questions, through the openai client or in offline batches."""
