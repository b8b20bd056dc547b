"""Loaders, settings and storage compared honestly: fresh processes, interleaved, proved cold, checked bit by bit.

loaders      our loader and its rivals, each as its users call it; `contract` says what one is, and `components` are
             those that make a module from a directory
runner       the loop over cases, loaders and repetitions
sample       one load in a process of its own, which `child` starts; `check` compares its tensors
storage      places to measure on, with copies of the files; `throttle` simulates slow ones
document     the result, read and written; `statistics` sums its samples up
compare      two results side by side
table        a result as text, `markdown` and `picture` as those
"""

from __future__ import annotations
