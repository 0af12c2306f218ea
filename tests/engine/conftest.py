"""Triton's interpreter puts its own language in place anew for each call of a helper, which takes longer than most
helpers do: here once a launch, as for the kernel itself.
"""

import importlib.util
from typing import Any

if importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    _replaced = set[object]()  # helpers whose language is in place, of the launch that runs
    _launch = interpreter.GridExecutor.__call__

    def _launched(self: Any, *args: Any, **kwargs: Any) -> None:
        _replaced.clear()
        _launch(self, *args, **kwargs)

    def _called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in _replaced:
            _replaced.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = _launched
    interpreter.InterpretedFunction.__call__ = _called
