"""Where weights end up: host memory or a CUDA device, and how bytes get there."""
