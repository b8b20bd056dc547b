"""Modules larger than the device: a repeated list of blocks stays in the files, and each block comes when it is needed.

    stream_blocks, steps   the public call; what it does, from the request to the hooks
    blocks     the streamable tensors of each block, and their places in a buffer: pure
    split      which blocks stay on the device, and for which of the others there is host memory: pure
    ledger     what modules hold that share a limit: pure
    decision   all that is decided, as one value: pure
    converted  an entry of the converted cache in the place of the checkpoint
    schedule   which block goes into which buffer, and when: knows neither torch nor a GPU
    source     bytes of the files: pages of the cache that are registered with the driver, or reads ...
    reads      ... ahead of the computation, in the order in which blocks are asked for, ...
    slots      ... through a bounded number of pinned slots
    device     the buffers and the order of copies and computation (`cuda_device`: by streams and events)
    workspace  what modules have in common that share buffers
    away       what stands in the place of parameters that are not on the device: every use is a clear error
    handle     the module's hooks, and everything that is given back at the end

Computation is never asked to wait on the host, unless bytes must be read: the GPU's two streams wait for each other.
"""
