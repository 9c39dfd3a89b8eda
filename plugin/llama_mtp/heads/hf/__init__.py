"""Heads out of Hugging Face checkpoints, without PyTorch."""
