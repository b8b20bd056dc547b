"""The part of the profiler that runs inside a foreign program. Copied next to a sitecustomize, so it imports only the
standard library and itself, works on any Python from 3.9, and never raises into the program."""
