"""The analysis that makes a session, with its verdict and advice, of a recording. Pure."""
