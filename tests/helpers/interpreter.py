"""Triton's interpreter with less work per call of a device function."""

from triton.runtime import interpreter

_patched_modules: set[int] = set()  # identities of the globals for which this launch has patched the language


def patch_language_once_per_launch():
    """Replace the interpreter's call of a device function.

    Triton 3.9 replaces every function of its language at each such call, of `tl.sum` and `tl.cdiv` too -> 40% of a
    kernel's time. They stay replaced until the launch ends, so once for each module that defines device functions is
    enough.
    """
    scope = interpreter._LangPatchScope
    restore = scope.restore

    def restore_and_forget(self):
        restore(self)
        _patched_modules.clear()

    scope.restore = restore_and_forget
    interpreter.InterpretedFunction.__call__ = _call


def _call(function, *args, **kwargs):
    module = id(function.fn.__globals__)
    if module not in _patched_modules:
        interpreter._patch_lang(function.fn)
        _patched_modules.add(module)
    rewritten = function.rewrite()
    try:
        return rewritten(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
