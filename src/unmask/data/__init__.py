"""From files to cut, tokenized texts."""
