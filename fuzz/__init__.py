"""Bytes that a peer sends never run code and never stop the agent: one small target for each decoder (docs/fuzzing.md)."""
