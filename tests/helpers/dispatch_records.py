"""The operators of torch that run, in order."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(TorchDispatchMode):
    """Records the names of the operators of torch that run inside the `with`: `aten::empty` allocates."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
