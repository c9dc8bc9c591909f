"""Fine-tune supportive-conversation LoRA adapters, and own what the other parts share: run, catalog, chat, store."""
