"""Fine-tune supportive-conversation LoRA adapters: read data, check, train, publish, merge, push."""
