"""The profiler: observes loads and whole programs from outside, judges them, and renders what was recorded.

Nothing below imports it: the loader tells its observer of spans and knows no more. A recording becomes a `Session`
once; the terminal report, the JSON, the trace and the page are functions of it.
"""
