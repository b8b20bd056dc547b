"""All seams go in together, for as long as anybody wants them."""

import pytest

torch = pytest.importorskip("torch")

from wan_loader.fastpath import Accelerator  # noqa: E402


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
