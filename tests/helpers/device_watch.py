"""The engine on the meta device in the role of a GPU, and a watcher of what makes the host and the device wait.

Nothing is computed: shapes, copies and synchronisations are those of a GPU. Process groups are fake, of any size.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_aten = torch.ops.aten
# Operations whose output has a size that the host must read.
_SIZED_BY_VALUES = (_aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default)
_OURS = ("/icegrt/", "/engine/", "/kernels/", "megatron/core", "torch/optim/")


class DeviceWatch(TorchDispatchMode):
    """Counts by place: `syncs` (the host waits for the device), `blocking_copies` and `copies` from host to device.

    `launches` counts operations on the device by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.blocking_copies: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._constructors = _Constructors(self.blocking_copies)

    def __enter__(self):
        self._constructors.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._constructors.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if x.is_meta]
        if func is _aten._local_scalar_dense.default and on_device:
            self.syncs[f"item {_place()}"] += 1
            dtype = on_device[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is _aten._to_copy.default and tensors:
            source, target = tensors[0].is_meta, torch.device(kwargs.get("device") or tensors[0].device).type == "meta"
            if source and not target:
                self.syncs[f"to host {_place()}"] += 1
                return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            if target and not source:
                (self.copies if kwargs.get("non_blocking") else self.blocking_copies)[_place()] += 1
        if func is _aten.copy_.default and len(on_device) == 1:
            if tensors[0].is_meta:
                is_ahead = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                (self.copies if is_ahead else self.blocking_copies)[_place()] += 1
            else:
                self.syncs[f"to host {_place()}"] += 1
                return tensors[0].fill_(1)
        if func in _SIZED_BY_VALUES and on_device:
            self.syncs[f"{func.__name__} {_place()}"] += 1
            rows = on_device[0].numel()
            return torch.empty(rows, on_device[0].dim(), dtype=torch.int64, device=META)
        if func is _aten.repeat_interleave.Tensor and on_device:
            self.syncs[f"repeat_interleave {_place()}"] += 1
            return torch.zeros(64, dtype=torch.int64, device=META)
        if func.name().startswith("c10d::") and "coalesced" in func.name():
            return torch._C._distributed_c10d.FakeWork()
        out = func(*args, **kwargs)
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        if on_device or any(x.is_meta for x in outputs):
            returns = func._schema.returns
            is_view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
            if not is_view and not func.__name__.startswith(("empty", "detach")):
                self.launches[func.__name__] += 1
        return out


class _Constructors(TorchFunctionMode):
    """Counts tensors that are made on the device from numbers: their copy blocks, and no dispatch mode sees it."""

    def __init__(self, copies: Counter[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.is_meta and not isinstance(args[0], torch.Tensor):
            self.copies[_place()] += 1
        return out


def _place() -> str:
    for frame in reversed(traceback.extract_stack()[:-2]):
        if any(part in frame.filename for part in _OURS):
            return f"{frame.filename.split('site-packages/')[-1].rpartition('/wt/sync/')[-1]}:{frame.lineno}"
    return "?"


@contextlib.contextmanager
def meta_cluster(layout, world_size: int = 1, rank: int = 0):
    """Open the cluster of one of `world_size` ranks whose device is the meta device; collectives return at once."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    from icegrt.distributed import cluster, cpu_backend
    from icegrt.kernels.linear import chunked

    class Coalescing:
        def wait(self) -> None: ...

    @contextlib.contextmanager
    def coalescing_manager(*args, **kwargs):
        yield Coalescing()

    cuda_names = cpu_backend._cuda_type_names

    def type_names(original):
        inner = cuda_names(original)

        def tensor_type(self, *args, **kwargs):
            if self.is_meta and not args and not kwargs:
                return f"torch.cuda.{original(self).rpartition('.')[-1]}"
            return inner(self, *args, **kwargs)

        return tensor_type

    environment = {
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", environment))
        stack.enter_context(mock.patch.object(cluster, "local_device", lambda: META))
        stack.enter_context(mock.patch.object(cpu_backend, "_CPU", META))
        stack.enter_context(mock.patch.object(cpu_backend, "_cuda_type_names", type_names))
        stack.enter_context(mock.patch.object(buffers, "_coalescing_manager", coalescing_manager))
        stack.enter_context(mock.patch.object(chunked, "_disable_autocast", lambda x: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(cluster, "_opening_store", dist.HashStore))
        stack.enter_context(mock.patch.object(cluster, "_connection", lambda store, purpose: store))
        stack.enter_context(mock.patch.object(cluster, "HangMonitor", mock.Mock()))
        dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=world_size, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        yield stack.enter_context(cluster.Cluster.open(layout))
