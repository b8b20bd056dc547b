"""Modules larger than the device: a repeated list of blocks stays in the files, and each block comes when it is needed.

    blocks    the streamable tensors of each block, and their places in a buffer: pure
    split     which blocks stay on the device, how many come each time, how many of those are pinned: pure
    schedule  which block goes into which buffer, and when: knows neither torch nor a GPU
    source    bytes of the files: pages of the cache that are registered with the driver, or reads into pinned slots
    device    the buffers and the order of copies and computation (`cuda_device`: by streams and events)
    away      what stands in the place of parameters that are not on the device: every use is a clear error
    handle    the module's hooks, and everything that is given back at the end

Computation is never asked to wait on the host, unless bytes must be read: the GPU's two streams wait for each other.
"""
