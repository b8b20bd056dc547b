"""All seams go in together, for as long as anybody wants them."""

import pytest

torch = pytest.importorskip("torch")

from wan_loader.fastpath import Accelerator  # noqa: E402
from wan_loader.provenance.prove import prove  # noqa: E402


def test_it_is_in_until_the_last_one_takes_it_out():
    original = torch.nn.Module.to
    accelerator = Accelerator()
    with accelerator:
        replaced = torch.nn.Module.to
        assert replaced is not original
        assert accelerator.install() is accelerator
    assert torch.nn.Module.to is replaced
    accelerator.uninstall()
    assert torch.nn.Module.to is original
    with pytest.raises(RuntimeError, match="more often"):
        accelerator.uninstall()


def test_it_is_taken_out_after_an_error():
    original, accelerator = torch.nn.Module.to, Accelerator()
    with pytest.raises(ZeroDivisionError), accelerator:
        raise ZeroDivisionError
    assert torch.nn.Module.to is original
    assert not accelerator.is_installed


def test_what_is_still_mapped_gets_memory_of_its_own_in_the_end(tmp_path):
    torch.save({"weight": torch.ones(100, 100), "bias": torch.zeros(100)}, tmp_path / "x.pth")
    module = torch.nn.Linear(100, 100)
    with Accelerator(min_nbytes=0) as accelerator:
        state = torch.load(tmp_path / "x.pth")
        module.load_state_dict(state)
        assert prove({"value": state["weight"], "parameter": module.weight}).ranges.keys() == {"value", "parameter"}
    assert not prove({"value": state["weight"], "parameter": module.weight}).ranges
    assert torch.equal(module.weight, torch.ones(100, 100))
    assert accelerator.tally.spared == {"copies of files into memory": 1, "copies by load_state_dict": 2}
    torch.save(state, tmp_path / "x.pth")
