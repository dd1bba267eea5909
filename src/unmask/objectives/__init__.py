"""Pretraining objectives: masked language modeling, alone or with sentence pairs."""
