"""Shipped recipes: data, no code."""
