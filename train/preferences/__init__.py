"""Training on preference pairs: the forms that are read, TRL's DPOTrainer, what changed."""
