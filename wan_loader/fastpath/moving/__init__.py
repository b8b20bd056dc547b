"""Modules that move to a GPU: what they are made of, and the loads that bring it there.

moves          the seam: torch's `Module.to`, `.cuda`, and its casts on the CPU
slots          the places of parameters and buffers in a module
fetching       one move: what is proven is loaded from its files, the rest from memory
memory_moves   tensors that no file holds, out of this process's own memory
returns        the way back to the CPU, of what still is in its files
origins        what tensors on a device were fetched from
loads          the load that all of it uses
"""
