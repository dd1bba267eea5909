"""Evaluation of models on held-out and other text."""
