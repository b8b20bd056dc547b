"""Measurements and facts of this machine.

ceilings       what it can do, measured once and kept
measure        the measurements
system_facts   what files lie on, and what this system allows
diagnosis      advice from both
"""
