"""Loaders, settings and storage compared honestly: fresh processes, interleaved, proved cold, checked bit by bit."""

from __future__ import annotations
