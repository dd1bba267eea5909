"""The report of runs: one HTML page with curves, sentences over time, details of the predictions, and all settings."""
