"""The way of a recording to a session with its verdict and advice. Pure."""
