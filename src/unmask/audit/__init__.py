"""Is a masker what it says? Judged by its inputs and outputs alone."""
