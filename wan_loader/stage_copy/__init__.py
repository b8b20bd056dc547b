"""Copies of checkpoints on faster storage: a RAM disk, a local disk beside a network one."""

from __future__ import annotations
