"""The provenance of tensors: the bytes of a file that a tensor on the CPU is, proven by the kernel, or what is missing.

Whatever library mapped the file, and whatever views were made of it since: nothing is noted when a file is loaded, the
memory itself is looked at when somebody asks.

    tensor_memory   where a tensor lies in memory, as torch says
    mapped_files    whether the file of a mapping still is what its path leads to
    proof           the values, and the judgement from what is known: pure
    prove           asks everybody, and judges
    as_checkpoint   proven ranges as a checkpoint, which one load then reads

Internal: nothing of it is public yet.
"""
