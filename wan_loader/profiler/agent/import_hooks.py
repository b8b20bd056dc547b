"""The timing of every module that is executed or loaded, by top-level package; hooks run when a module has arrived.

The loaders' own methods are wrapped, so modules keep their loaders and specs. The wrappers carry the import system's
file name, and the name of its function that calls into modules, so that the interpreter leaves them out of tracebacks
like the rest of the import system.

Imports lie deep in each other, and Python takes and gives back memory for frames by chunks: with one frame more in each
import, a start with diffusers had 20,000 page faults more. So the wrapper of Python modules executes them itself, in
the place of two frames of the import system.
"""

from __future__ import annotations

import _frozen_importlib_external as machinery

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["install"]

_HIDDEN = "<frozen importlib._bootstrap>", "_call_with_frames_removed"


def install(recorder: Any, hooks: Any) -> None:
    """Wrap the import system's loaders.

    Args:
        recorder: Gets the spans.
        hooks: Module name -> function called with the module, once, after it was executed.
    """
    source = machinery.SourceFileLoader
    basics = next(c for c in source.__mro__ if "exec_module" in vars(c))
    extension = machinery.ExtensionFileLoader
    for owner, attribute in ((basics, "exec_module"), (extension, "create_module"), (extension, "exec_module")):
        original = vars(owner)[attribute]
        wrapper = _wrapper(recorder, original, hooks if attribute == "exec_module" else {}, executes=owner is basics)
        setattr(owner, attribute, _hidden(wrapper))
        recorder.undo.append(
            lambda owner=owner, attribute=attribute, original=original: setattr(owner, attribute, original)
        )


def _wrapper(recorder: Any, original: Any, hooks: Any, *, executes: Any) -> Any:
    begin, end, run = recorder.begin, recorder.end, _run_hook

    def call(self: Any, subject: Any) -> Any:
        if not recorder.on:
            return original(self, subject)
        name = getattr(subject, "__name__", None) or subject.name
        package = name.partition(".")[0]
        around = recorder.around()
        # inside of it, it is the package's own time already
        outermost = around is None or around[0] != "import" or around[1] != package
        if outermost:
            begin("import", package)
        try:
            code = self.get_code(name) if executes else None
            if code is None:
                result = original(self, subject)
            else:  # what the original would do
                result = None
                exec(code, subject.__dict__)
        finally:
            if outermost:
                end()
        if name in hooks:
            run(hooks, name, subject)
        return result

    return call


def _run_hook(hooks: Any, name: Any, module: Any) -> None:
    try:
        hooks.pop(name)(module)
    except Exception:  # a hook that does not fit this version: that part is not recorded
        return


def _hidden(function: Any) -> Any:
    function.__code__ = function.__code__.replace(co_filename=_HIDDEN[0], co_name=_HIDDEN[1])
    return function
