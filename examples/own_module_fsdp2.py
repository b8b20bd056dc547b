"""A module of one's own, divided over processes by FSDP2 and filled from a checkpoint that is read once in all.

    torchrun --nproc_per_node 2 examples/own_module_fsdp2.py net.safetensors

Without a GPU the processes meet by gloo, and the weights stay on the CPU. If the file is not there, it is made first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import wan_loader


class Net(nn.Module):
    """Some blocks and a head, as large models have them."""

    def __init__(self, width: int = 64, n_blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(n_blocks)
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks, each beside what it is given."""
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def main(path: Path) -> None:
    """Build on meta, divide, load each process's rows, run."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if rank == 0 and not path.exists():
        save_file(Net().state_dict(), path)
    dist.barrier()

    with wan_loader.empty_weights():
        net = Net()
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    report = wan_loader.load_into(net, path, device=device)

    result = net(torch.ones(1, 64, device=device)).sum().item()
    print(f"process {rank}: {report.nbytes_device} bytes here, result {result:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
