"""Loads of several processes: who reads what, how they exchange it, and how they notice that one failed."""
