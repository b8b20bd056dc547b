"""Entries of a cache on the disk: damage, and what is left over."""


def flip(file, position=0):
    """Change a bit of one byte, of a file that may not be written."""
    file.chmod(0o600)
    with open(file, "r+b") as f:
        f.seek(position)
        byte = f.read(1)[0]
        f.seek(position)
        f.write(bytes([byte ^ 0x10]))


def left_over(cache):
    """Everything that is neither a complete entry nor set aside."""
    return [p for room in ("building", "trash") for p in (cache / room).iterdir()]
