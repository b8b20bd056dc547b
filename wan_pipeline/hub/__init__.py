"""Getting WAN2.2 from the Hugging Face Hub, and knowing what is still missing of it."""

from __future__ import annotations
