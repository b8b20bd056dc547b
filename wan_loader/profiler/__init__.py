"""The profiler: observes loads and whole programs from outside, judges them, and renders what was recorded.

    program    runs any program with the agent inside it, and brings back what its processes wrote
    in_process the same for a block of this process
    watch      processes as they look from outside
    blocked    what a process that does nothing waits for
    logs       what the agent wrote, read back as anybody's
    agent      the recording inside a foreign program
    analysis   from a recording to a `Session` with its advice; the verdict's rules are in `wan_loader.verdict`
    probe      what this machine can do, measured, and what its files lie on
    render     a session as text, page, trace or picture

Nothing below imports it: the loader tells its observer of spans and knows no more. A recording becomes a `Session`
once; the terminal report, the JSON, the trace and the page are functions of it.
"""
