"""Hugging Face folders to Megatron checkpoints and back: one engine, and one small file for each family."""
