"""Lean imports: what the networks do not need stands ready, and runs at its first use."""
