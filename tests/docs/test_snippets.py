"""Every block of code of README and of the guides runs, where what it names is small and there is no GPU."""

import pytest
from markdown import ROOT, blocks

PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs" / "guide").glob("*.md")))
BLOCKS = [block for page in PAGES for block in blocks(page)]
#: What a reader has by then: the imports above on the page, and names that stand for theirs.
BEFORE = """
import torch, torch.distributed as dist, wan_loader, wan_pipeline
from diffusers import WanPipeline
from torch.distributed.fsdp import fully_shard
from my_model import Model, config
send = lambda name, tensor: None
inputs = torch.ones(1, 16)
"""
ALONE_IN_A_GROUP = "dist.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)\n"
#: On a page, and in a test.
SMALLER = {
    '"cuda"': '"cpu"',
    '("Two cats boxing on a stage")': '("Two cats boxing on a stage", size=(32, 32), frame_num=5, steps=2)',
}
WORDS = {"8": "2", "cuda": "cpu", "12GB": "6GB", "24GB": "8GB"}
#: Commands that need a network or change an environment; what they are is compared elsewhere or by hand.
NOT_RUN = {".", "pip"}


def params(kind):
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language == kind]


def test_each_block_is_of_a_kind_that_is_run():
    assert {block.language for block in BLOCKS} == {"python", "console"}
    assert len(params("python")) >= 10
    assert len(params("console")) >= 10


@pytest.mark.parametrize("block", params("python"))
def test_python(place, block):
    code = block.text
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    before = "" if code.startswith("import") else BEFORE
    if "dist." in code:
        before += ALONE_IN_A_GROUP
    place.run("-c", before + code)


@pytest.mark.parametrize("block", params("console"))
@pytest.mark.timeout(400)
def test_console(place, block):
    served = "standby" in block.text
    for program, *words in block.commands():
        words = [WORDS.get(word, word) for word in words]
        if program == "wan-pipeline" or "wan_pipeline" in words:
            words += smaller_video(words)
        if "bench" in words:
            words += ["--repeat", "1", "--loader", "ours"]
        if "generate.py" in words and "Wan2.2-T2V-A14B" in words:  # ours stands for the official one
            words[words.index("Wan2.2-T2V-A14B")] += "-Diffusers"
        if program in NOT_RUN:
            continue
        module = {"wan-loader": "wan_loader", "wan-pipeline": "wan_pipeline", "torchrun": "torch.distributed.run"}
        if served:  # a fork of the server is a process of the server's, whoever asks for it
            place.run_itself("-m", module[program], *words, WAN_LOADER_STANDBY="")
        else:
            place.run("-m", module[program], *words)


def smaller_video(words):
    """What is added to a command that makes a video, so that it takes no time."""
    if "generate" not in words or "--frame_num" in words:
        return []
    return ["--size", "32*32", "--frame_num", "5", "--sample_steps", "2", "--force"]
