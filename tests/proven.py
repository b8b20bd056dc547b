"""What a proof says, held against the bytes of the files: for the tests of provenance."""

import torch
from loader_cases import same

from wan_loader.dtypes import torch_dtype


def from_file(proof, name):
    """Read a proven tensor from its file, with plain calls."""
    place = proof.ranges[name]
    with open(proof.files[place.file].path, "rb") as file:
        file.seek(place.start)
        data = bytearray(file.read(place.nbytes))
    assert len(data) == place.nbytes
    return torch.frombuffer(data, dtype=torch_dtype(place.dtype)).as_strided(place.shape, place.stride)


def check_proof(proof, tensors):
    """Each tensor has a range or a reason, and what has a range is those bytes."""
    assert proof.ranges.keys() | proof.reasons.keys() == tensors.keys()
    assert not proof.ranges.keys() & proof.reasons.keys()
    for name in proof.ranges:
        same(from_file(proof, name), tensors[name])
        assert proof.ranges[name].stride == tensors[name].stride()
