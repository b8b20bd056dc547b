"""Programs with torch in forks of the stand-by server."""

import pytest
from standbys import Standby

_PROGRAM = """
import sys
assert "torch" in sys.modules
import torch, wan_loader
from wan_loader.system.forks import is_forked
fast = wan_loader.accelerate()
device = sys.argv[1]
print(fast.is_installed, hasattr(torch.nn.Module.to, "__wrapped__"), is_forked(), torch.get_num_threads(), end=" ")
print(torch.cuda._is_in_bad_fork(), float(torch.ones(9, device=device).sum()))
print(float(torch.rand(1)))
if "--keep" in sys.argv: print("keeps", fast.keeps)
fast.tally.served("Model", 7, 0.5)
"""


@pytest.fixture(scope="module")
def with_torch():
    server = Standby()
    del server.env["CUDA_VISIBLE_DEVICES"]
    server.start("torch")
    yield server
    server.close()


def test_torch_is_as_in_a_process_of_its_own(with_torch, script, device):
    path = script(_PROGRAM)
    env = {"OMP_NUM_THREADS": "3"}
    done = [with_torch.run("--report", path, device, env=env, said=True) for _ in range(2)]
    assert [one.stdout.splitlines()[0] for one in done] == ["True True False 3 False 9.0"] * 2, done
    assert done[0].stdout != done[1].stdout  # other random numbers
    assert done[0].stderr.startswith("wan-loader: 1 load took the fast path: 7 B in 0.5 s")
    assert done[0].stderr.endswith("\nstarted\n  forked\n")
    for word in ([], ["--keep"]):
        kept = with_torch.run(*word, path, device, "--keep", env=env)
        assert kept.stdout.endswith(f"keeps {bool(word)}\n")
    off = with_torch.run(path, device, env=env | {"WAN_LOADER_ACCELERATE": "0"}, said=True)
    assert off.stdout.startswith("False False False 3 False 9.0\n")
    assert off.stderr == "wan-loader: the fast path is off: WAN_LOADER_ACCELERATE=0\n"


@pytest.mark.gpu
def test_on_cuda_what_looks_for_a_gpu_while_it_is_imported_is_served(own, script):
    if not torch_has_cuda():
        pytest.skip("no CUDA device")
    pytest.importorskip("diffusers")
    server = own()
    del server.env["CUDA_VISIBLE_DEVICES"]
    server.start("torch", "diffusers.utils.torch_utils", "diffusers.models.transformers.transformer_wan")
    assert "left to programs" not in server.command("standby", "status").stdout
    path = script(
        "import sys\nassert 'diffusers.models.transformers.transformer_wan' in sys.modules\n"
        "import torch\nprint(torch.cuda.is_available(), torch.cuda.device_count(), float(torch.ones(9).cuda().sum()))"
    )
    import torch

    assert server.run(path, said=True).stdout == f"True {torch.cuda.device_count()} 9.0\n"


def torch_has_cuda():
    import torch

    return torch.cuda.is_available()
