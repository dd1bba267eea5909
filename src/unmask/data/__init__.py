"""Reading, splitting, tokenizing and sampling of text."""
