"""The devices that weights end up on: host memory or a CUDA device, and how bytes get there."""
