"""What is read: checkpoints, LoRA adapters and the merge YAML."""
