"""The promises of contracts.py as laws, for whatever claims to keep them."""
