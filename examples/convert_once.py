"""A checkpoint in fp32 that is used as bf16: converted by the first load, read at half of its size from then on.

    python examples/convert_once.py Wan2.2-T2V-A14B/high_noise_model --cache_dir /fast/disk/cache

The first load reads the source, and an entry of the cache is written behind it; the second one finds that entry. It is
found by the identity of the source's files, so a checkpoint that was replaced is converted anew.
"""

from __future__ import annotations

import argparse
import time

import torch

import wan_loader


def main() -> None:
    """Load twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache_dir", help="by default the user's")
    args = parser.parse_args()

    loads = []
    for which in ("first", "second"):
        begin = time.perf_counter()
        result = wan_loader.load(
            args.checkpoint, device=args.device, dtype="bf16", cache=True, cache_dir=args.cache_dir
        )
        seconds, report = time.perf_counter() - begin, result.report
        print(f"{which}: {seconds:.2f} s, {report.nbytes_file} bytes read, cache: {report.cache.state}")
        if result.build is not None:
            result.build.wait()  # else the process would wait for it when it ends
        loads.append(result.tensors)

    first, second = loads
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    print("every bit equal" if equal else "different")


if __name__ == "__main__":
    main()
