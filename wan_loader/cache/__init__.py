"""The converted cache: a checkpoint that was converted once is read in its final dtypes from then on.

outline     what an entry holds, decided from headers alone; and the key that says which source it was made from
manifest    what an entry says about itself: sizes, checksums, source
store       the directory of entries: found, built, pruned by any number of processes at once
content     weights for an entry, from tensors that were just loaded or from the source
build       writes an entry in the background
check       checksums against what lies on the disk
"""
