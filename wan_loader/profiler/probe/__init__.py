"""Measurements and facts of this machine.

ceilings       what it can do, measured once and kept
busy           whether others want its processors meanwhile
surroundings   what a recording is compared with
measure        the measurements
system_facts   what files lie on, and what this system allows
machine_findings   advice from both
"""
