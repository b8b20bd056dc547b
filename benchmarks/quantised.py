"""An expert out of quantised files: how fast it arrives as bf16, as it stands in the file, and whether it is right.

    python benchmarks/quantised.py /data --blocks 20 --output quantised.json

Makes the blocks of an A14B expert as bf16 safetensors, scaled fp8 safetensors, and GGUF (Q8_0, Q4_K) unless they are
there: random blocks whose scales are small. Every sample is a fresh process that has imported torch and the loader and
made the CUDA context before its clock starts; forms take turns, and the page cache is warm. "as bf16" dequantises on
the device, "as it is" gives the file's own tensors. "GB" and "of the weights" are of the file, and of the same weights
in bf16, a second. The first sample of each form is compared: scaled fp8 whole, with fp32(weight) * fp32(scale) by
torch; of GGUF the first tensors with what the gguf package makes of them (needs `gguf`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from turns import block_shapes, describe_run, environment, make_expert, run_fresh

#: Form -> the file below the directory.
FORMS = {"bf16": "bf16", "scaled fp8": "fp8.safetensors", "Q8_0": "Q8_0.gguf", "Q4_K": "Q4_K.gguf"}
_COMPARED = 2

_SAMPLE = """
import json, os, resource, sys, time
path, device, dtype, check = sys.argv[1:]
import torch
import wan_loader
wan_loader.load_file  # imported on first use
cuda = device.startswith("cuda")
if cuda:
    torch.zeros(1, device=device)
    torch.cuda.synchronize()

def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

before, begun = cpu(), time.perf_counter()
found = wan_loader.load_file(path, device=device, dtype=None if dtype == "-" else dtype)
if cuda:
    torch.cuda.synchronize()
seconds, cpu_s, equal = time.perf_counter() - begun, cpu() - before, 0
peak = torch.cuda.max_memory_allocated() if cuda else 0
if check != "-" and path.endswith(".safetensors"):
    from safetensors import safe_open
    with safe_open(path, "pt", device=device) as file:
        for name in file.keys():
            if name.endswith(".weight"):
                weight, scale = file.get_tensor(name), file.get_tensor(name.replace(".weight", ".scale_weight"))
                assert torch.equal(found[name], (weight.float() * scale.float()).to(torch.bfloat16)), name
                equal += 1
elif check != "-" and path.endswith(".gguf"):
    import gguf
    for tensor in gguf.GGUFReader(path).tensors[: int(check)]:
        numbers = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        assert torch.equal(found[tensor.name].cpu(), numbers), tensor.name
        equal += 1
nbytes = sum(t.nbytes for t in found.values() if isinstance(t, torch.Tensor))
print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "nbytes": nbytes, "peak_bytes": peak, "compared": equal}))
"""


def make_fp8(path: Path, matrices: dict[str, tuple[int, ...]]) -> None:
    """Make scaled fp8 safetensors: weights that are finite, one scale each, and the marker."""
    import torch
    from safetensors.torch import save_file

    tensors = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for i, (name, shape) in enumerate(matrices.items()):
        pattern = torch.randint(0, 126, (shape[1],), dtype=torch.uint8).repeat(shape[0], 1)
        tensors[name] = pattern.view(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(0.001 * (i % 7 + 1))
    save_file(tensors, path)


def make_gguf(path: Path, matrices: dict[str, tuple[int, ...]]) -> None:
    """Make a GGUF file of random blocks; their scales are small, so that all numbers are finite."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[path.stem]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "wan", use_temp_file=False)
    numbers = np.random.default_rng(0)
    for name, (rows, columns) in matrices.items():
        row = numbers.integers(0, 256, (columns // elements, nbytes), dtype=np.uint8)
        scales = 4 if kind.name == "Q4_K" else 2  # the bytes of a block's scales, in fp16
        row[:, :scales] = numbers.uniform(0.001, 0.01, (len(row), scales // 2)).astype(np.float16).view(np.uint8)
        writer.add_tensor(name, np.tile(row.reshape(1, -1), (rows, 1)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(args: argparse.Namespace) -> dict[str, Path]:
    """Make what is not there: form -> file or directory."""
    width = 5120 if args.size == "full" else 256
    paths = {form: args.directory / f"quantised-{args.size}-{args.blocks}" / name for form, name in FORMS.items()}
    matrices = {name: shape for name, shape in block_shapes(args.blocks, width).items() if len(shape) == 2}
    if args.size == "tiny":
        matrices = {"blocks.0.ffn.0.weight": (512, width)}
    for form, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            continue
        if form == "bf16":
            make_expert(path, args.blocks, "bfloat16", width)
        else:
            (make_fp8 if form == "scaled fp8" else make_gguf)(path, matrices)
    return paths


def told(form: str, dtype: str, samples: list[dict[str, Any]], file_nbytes: int, weights_nbytes: int) -> str:
    """Write a line of the table."""
    seconds = sorted(one["seconds"] for one in samples)
    median, cpu_s = statistics.median(seconds), statistics.median(one["cpu_s"] for one in samples)
    way = "as bf16" if dtype == "bf16" else "as it is"
    compared = f"  {samples[0]['compared']} tensors equal" if samples[0]["compared"] else ""
    return (
        f"{form:<11} {way:<9} {file_nbytes / 1e9:>6.2f} GB {median:>7.3f} s ({seconds[0]:.3f} .. {seconds[-1]:.3f}) "
        f"{cpu_s:>6.2f} CPU-s {file_nbytes / median / 1e9:>6.1f} GB/s "
        f"{weights_nbytes / median / 1e9:>6.1f} of the weights {samples[0]['peak_bytes'] / 1e9:>6.2f} GB peak{compared}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the files are, or are made")
    parser.add_argument("--blocks", type=int, default=20, help="of the expert's 40 (default: 20)")
    parser.add_argument("--samples", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--output", type=Path, help="all samples, as JSON")
    args = parser.parse_args()
    paths = make(args)
    turns = [(form, dtype) for form in FORMS for dtype in ("bf16", "-") if (form, dtype) != ("bf16", "-")]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {turn: [] for turn in turns}
    env = environment(Path(__file__).parents[1])
    for i in range(args.samples + 1):  # the first is compared, and counts for nothing else
        for form, dtype in reversed(turns) if i % 2 else turns:
            check = str(_COMPARED) if i == 0 and dtype == "bf16" and form != "bf16" else "-"
            found[form, dtype].append(run_fresh(_SAMPLE, [str(paths[form]), args.device, dtype, check], form, env=env))
    weights, document = found["bf16", "bf16"][0]["nbytes"], []
    for (form, dtype), samples in found.items():
        path, compared = paths[form], samples[0]["compared"]
        nbytes = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        counted = [one | {"compared": compared} for one in samples[1:]]
        print(told(form, dtype, counted, nbytes, weights))
        document.append({"form": form, "dtype": dtype, "file_nbytes": nbytes, "samples": counted})
    if args.output is not None:
        args.output.write_text(
            json.dumps(describe_run() | {"weights_nbytes": weights, "forms": document}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
