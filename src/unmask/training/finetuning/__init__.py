"""Fine-tuning on labeled data: classification and regression of texts, text pairs and tokens."""
