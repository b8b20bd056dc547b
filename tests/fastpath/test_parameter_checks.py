"""What torch before 2.5 takes for an uninitialised parameter, and what the replacement does."""

import pytest

torch = pytest.importorskip("torch")

from wan_loader.fastpath.deferral.parameter_checks import _of_the_class, install  # noqa: E402
from wan_loader.fastpath.patches import Patches  # noqa: E402
from wan_loader.fastpath.tally import Tally  # noqa: E402


class CallsItself(torch.Tensor):
    _is_param = True


class OldMeta(type(torch.Tensor)):
    """torch 2.4's own."""

    def __instancecheck__(cls, instance):
        return super().__instancecheck__(instance) or getattr(instance, "_is_param", False)


class Parameter(torch.Tensor, metaclass=OldMeta):
    pass


class Uninitialised(Parameter):
    pass


def test_only_the_class_itself_takes_what_calls_itself_a_parameter(monkeypatch):
    tensor = torch.ones(2).as_subclass(CallsItself)
    assert isinstance(tensor, Uninitialised)
    monkeypatch.setattr(OldMeta, "__instancecheck__", _of_the_class(OldMeta.__instancecheck__))
    assert isinstance(tensor, Parameter)
    assert not isinstance(tensor, Uninitialised)
    assert isinstance(torch.ones(2).as_subclass(Uninitialised), Uninitialised)


def test_this_torch_knows_the_difference_while_it_is_installed():
    tensor = torch.ones(2).as_subclass(CallsItself)
    before = torch.nn.parameter._ParameterMeta.__instancecheck__
    patches = Patches(Tally())
    install(patches)
    try:
        assert isinstance(tensor, torch.nn.Parameter)
        assert not isinstance(tensor, torch.nn.UninitializedParameter)
        assert isinstance(torch.nn.UninitializedParameter(), torch.nn.UninitializedParameter)
    finally:
        patches.undo()
    assert torch.nn.parameter._ParameterMeta.__instancecheck__ is before
