"""Models in and out, without code of ours on the other side: what `transformers` opens, and opens with equal logits."""
