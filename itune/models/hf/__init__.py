"""Hugging Face checkpoints: find the files, plan what maps to what, read slices, write folders. No torch."""
