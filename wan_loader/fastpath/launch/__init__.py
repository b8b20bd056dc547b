"""Whole programs with the fast path inside.

waiting     in a process: nothing, until torch has been imported
script      a script or a module, in this process
children    any other program, with all Python processes that it starts
tallies     what those processes have counted
enable      all processes of an environment
"""
