"""Weights that stay in a device's memory between programs: kept once, attached by every load that asks for them.

    identity        what tells kept weights apart
    place           where the keeper and its clients meet
    messages        what they say to each other, descriptors included
    shelf           what is kept, who uses it, what goes first: pure
    serve           the keeper: a process that holds descriptors, and neither torch nor a context of CUDA
    client          the side of a program
    table           which bytes of the kept memory are which tensor
    checksum        whether they still are what was loaded
    keeping         a load whose tensors are put into shared memory, which the keeper is given
    attach          a load that takes them from there

The design is in docs/design/kept-weights.md.
"""
