"""The watcher: a dispatch mode that counts what every operation would do on a GPU, and refuses what CUDA refuses.

Tensors of the meta device are device tensors. Tensors of the CPU are host tensors. Nothing of the device is computed,
but integers that come from the host keep their values (`shadows`), so the host reads what it would read.
"""

from __future__ import annotations

import contextlib
import pickle
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from icegrt.kernels.common.operators import NAMESPACE, OPERATORS
from icegrt.rehearsal import collectives, costs, shadows
from icegrt.rehearsal.collectives import DeviceMismatch
from icegrt.rehearsal.counts import TO_DEVICE, TO_HOST, Copy, PhaseCounts, Transfer
from icegrt.rehearsal.memory import TEMPORARY, Ledger
from icegrt.rehearsal.operations import category_of, in_backward, in_recomputation, is_view, puts_number, tensors_of
from icegrt.rehearsal.outcomes import Outcomes
from icegrt.rehearsal.sites import Site, current_site

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")


class Watcher(TorchDispatchMode):
    """Counts by phase. Enter it around the code to watch; `phase` names what comes next.

    Args:
        device_type: of device tensors: "meta" in a rehearsal, "cpu" to watch a run on real tensors.
        rounding: of device storages, in bytes.
    """

    _entered: ClassVar[list[Watcher]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, and enter and leave it around every operation.
        return False

    def __init__(self, device_type: str = "meta", rounding: int = 512) -> None:
        super().__init__()
        self.phases: dict[str, PhaseCounts] = {}
        self.counts = PhaseCounts()
        self.device, self.host = Ledger(rounding), Ledger()
        self._device_type = device_type
        self._pinned: set[int] = set()
        self._outcomes = Outcomes()
        # Shapes that the next messages of Megatron's pipeline announce, in order, by rank of the pipeline.
        self.expected_shapes: dict[int, list[list[int]]] = {}
        self._handlers = {
            aten._local_scalar_dense.default: self._read_number,
            aten._to_copy.default: self._copy_to,
            aten.copy_.default: self._copy_into,
            aten.nonzero.default: self._nonzero,
            aten.masked_select.default: self._masked_select,
            aten.repeat_interleave.Tensor: self._repeat_interleave,
            aten.index.Tensor: self._index,
            aten.index_put_.default: self._index,
            aten._index_put_impl_.default: self._index,
            aten.equal.default: self._equal,
            aten._pin_memory.default: lambda func, args, kwargs: self.pinned_copy(args[0]),
            aten.is_pinned.default: lambda func, args, kwargs: self.is_pinned(args[0]),
        }

    @classmethod
    def current(cls) -> Watcher:
        """Return the watcher that was entered last."""
        return cls._entered[-1]

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that are in use."""
        return self.device.bytes

    def __enter__(self) -> Watcher:
        self._entered.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.pop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[PhaseCounts]:
        """Count what the block does under a name. Phases of one name add up; an inner phase interrupts the outer."""
        outer, self.counts = self.counts, self.phases.setdefault(name, PhaseCounts())
        start = self.device.mark(), self.host.mark()
        try:
            yield self.counts
        finally:
            self.counts.spans.append((start[0], self.device.mark(), start[1], self.host.mark()))
            self.counts = outer

    # -- what patched functions report -----------------------------------------------------------------------------

    def record_sync(self, reason: str) -> None:
        """Count a wait of the host for the device."""
        self.counts.syncs[reason, current_site()] += 1

    def pinned_copy(self, x: Tensor) -> Tensor:
        """Return a copy of a host tensor in memory that counts as page-locked."""
        copy = torch.empty_like(x).copy_(x)
        self._track(self.host, copy)
        self._pin(copy)
        return copy

    def is_pinned(self, x: Tensor) -> bool:
        """Return whether a host tensor is in memory that counts as page-locked."""
        return x.untyped_storage()._cdata in self._pinned

    def record_object_collective(self, name: str, group: Any, value: Any) -> None:
        """Count a collective of pickled objects: two device tensors, and a wait for each."""
        size = len(pickle.dumps(value))
        site = current_site()
        self.counts.transfers[Transfer(name, *collectives.describe_group(group))].add(size + 8, 2)
        self.counts.syncs[name, site] += 2
        self.counts.copies[Copy(TO_DEVICE, site, False, True)].add(size + 8, 2)
        self.counts.copies[Copy(TO_HOST, site, False, True)].add(size + 8, 2)

    def note_received(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], op: str, source: int) -> None:
        """Give tensors that other ranks fill this rank's values; announced shapes to messages of shapes."""
        known = shadows.values_of(inputs[0]) if len(inputs) == 1 and inputs[0].is_meta else None
        for x in outputs:
            if op == "receive" and x.dtype == torch.int64 and x.numel() == 3 and self.expected_shapes.get(source):
                shadows.set_values(x, torch.tensor(self.expected_shapes[source].pop(0)))
            elif op == "all-gather" and known is not None and x.is_meta:
                values = known.repeat(x.numel() // known.numel(), *[1] * (known.dim() - 1))
                shadow = shadows.values_of(x)
                if shadow is None:
                    shadows.set_values(x, values)
                else:
                    shadow.copy_(values.view_as(shadow))  # views of the same tensor see it too

    # -- every operation -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of(args, kwargs)
        if func.namespace == "profiler":  # the beginning and end of a range in a trace
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return collectives.run(self, func, args, kwargs)
        on_device = any(self._is_device(x) for x in tensors)
        if kwargs.pop("pin_memory", None):
            return self._allocate_pinned(func, args, kwargs)
        handler = self._handlers.get(func)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        if on_device:
            self._check_devices(func, tensors)
        return self._run(func, args, kwargs, tensors, on_device)

    def _run(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor], on_device: bool = True
    ) -> Any:
        """Run an operation, and count it if it is the device's."""
        is_remembered = on_device and self._device_type == "meta"
        result = self._outcomes.run(func, args, kwargs) if is_remembered else func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else tensors_of((result,), {})
        if not on_device and not any(self._is_device(x) for x in outputs):
            for x in outputs:
                self._track(self.host, x)
            self._count_on_host(func, args)
            return result
        if self._device_type == "meta":
            shadows.follow(func, args, kwargs, outputs)
        self._count(func, args, tensors, outputs)
        return result

    def _count(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        counts = self.counts
        site: Site | None = None
        for x in outputs:
            saved = torch.is_grad_enabled() and not in_backward()
            block = self.device.add(x.untyped_storage(), current_site, saved, in_backward)
            if block is not None and block.category == TEMPORARY:
                site = block.site
                block.category = category_of(site)
        if is_view(func):
            return
        name = func._schema.name.partition("::")[2]
        if func.namespace == NAMESPACE and name in OPERATORS:
            cost = OPERATORS[name].cost(*args)
            if name.startswith("attention_"):
                self.add_product(cost.flops, next(x.dtype for x in tensors if x.is_floating_point()))
            else:
                counts.vector_flops += cost.flops
            launched, read, written = cost.launches, cost.bytes_read, cost.bytes_written
        else:
            launched = costs.launches(name, args)
            read, written = costs.traffic(name, tensors, outputs, launched)
        if launched:
            key = name, site or current_site()
            counts.launches[key] += launched
            if in_backward():
                counts.backward_launches[key] += launched
        counts.bytes_read += read
        counts.bytes_written += written
        flops = costs.product_flops(name, args)
        if flops:
            self.add_product(flops, costs.product_dtype(name, args))

    def _count_on_host(self, func: Any, args: Sequence[Any]) -> None:
        name = func._schema.name.partition("::")[2]
        if not is_view(func) and costs.launches(name, args):
            self.counts.host_operations[name, current_site()] += costs.launches(name, args)

    def add_product(self, flops: int, dtype: torch.dtype) -> None:
        """Count FLOPs of tensor cores, and those of a forward pass that a backward pass repeats."""
        name = str(dtype).removeprefix("torch.")
        self.counts.product_flops[name] += flops
        if in_recomputation():
            self.counts.recomputed_flops[name] += flops

    def _track(self, ledger: Ledger, x: Tensor) -> None:
        saved = ledger is self.device and torch.is_grad_enabled() and not in_backward()
        ledger.add(x.untyped_storage(), current_site, saved, in_backward)

    def _is_device(self, x: Tensor) -> bool:
        return x.device.type == self._device_type

    def _check_devices(self, func: Any, tensors: Sequence[Tensor]) -> None:
        if self._device_type != "meta":
            return
        for x in tensors:
            if not x.is_meta and x.dim():
                raise DeviceMismatch(
                    f"{current_site()}: {func} gets a tensor {tuple(x.shape)} of the host beside tensors of the "
                    "device; CUDA refuses that"
                )

    # -- copies and waits ------------------------------------------------------------------------------------------

    def _read_number(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        if not self._is_device(x):
            self.counts.host_items += 1
            return NotImplemented
        self.record_sync("item")
        self.counts.copies[Copy(TO_HOST, current_site(), False, True)].add(x.element_size())
        return self._values(x).item() if x.is_meta else func(*args, **kwargs)

    def _copy_to(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else x.device.type
        if self._device_type != "meta" or (target == "meta") == x.is_meta:
            return NotImplemented
        if target == "meta":
            self._record_copy_to_device(x, bool(kwargs.get("non_blocking")))
            out = torch.empty(x.shape, dtype=kwargs.get("dtype") or x.dtype, device=META)
            self._keep_values(out, x)
            self._track(self.device, out)
            return out
        is_blocking = not kwargs.get("non_blocking")
        self._record_copy_to_host(x, False, is_blocking)
        on_host = self._values(x).to(kwargs.get("dtype") or x.dtype)
        self._track(self.host, on_host)
        return on_host

    def _copy_into(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        target, source = args[0], args[1]
        if self._device_type != "meta" or target.is_meta == source.is_meta:
            return NotImplemented
        self._count_on_host(func, args)
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if target.is_meta:
            self._record_copy_to_device(source, non_blocking)
            known = shadows.values_of(target)
            if known is not None:
                known.copy_(source)
            elif target.numel() == source.numel():
                self._keep_values(target, source.reshape(target.shape))
            return target
        self._record_copy_to_host(source, self.is_pinned(target), not (non_blocking and self.is_pinned(target)))
        return target.copy_(self._values(source))

    def _record_copy_to_device(self, x: Tensor, non_blocking: bool) -> None:
        pinned = self.is_pinned(x)
        copy = Copy(TO_DEVICE, current_site(), pinned, not (pinned and non_blocking))
        self.counts.copies[copy].add(x.numel() * x.element_size())

    def _record_copy_to_host(self, x: Tensor, pinned: bool, blocking: bool) -> None:
        site = current_site()
        self.counts.copies[Copy(TO_HOST, site, pinned, blocking)].add(x.numel() * x.element_size())
        if blocking:
            self.counts.syncs["copy to the host", site] += 1

    def _keep_values(self, x: Tensor, values: Tensor) -> None:
        if shadows.holds_values(x.dtype) and x.numel() <= shadows.LARGEST:
            shadows.set_values(x, values.to(x.dtype).clone())

    def _values(self, x: Tensor) -> Tensor:
        """Return what the host reads: the values if they are known, else ones, which are true, finite and positive."""
        values = shadows.values_of(x)
        return torch.ones(x.shape, dtype=x.dtype) if values is None else values.clone()

    # -- sizes that depend on values -------------------------------------------------------------------------------

    def _rows_of(self, x: Tensor) -> Tensor:
        """Return where a mask is set, on the host; everywhere if its values are unknown."""
        values = shadows.values_of(x)
        return (torch.ones(x.shape, dtype=torch.bool) if values is None else values).nonzero()

    def _device_integers(self, values: Tensor) -> Tensor:
        out = torch.empty(values.shape, dtype=values.dtype, device=META)
        shadows.set_values(out, values)
        self._track(self.device, out)
        return out

    def _sized(self, func: Any, tensors: Sequence[Tensor], out: Tensor) -> Tensor:
        self.record_sync(func._schema.name.partition("::")[2])
        self._count(func, tensors, tensors, [out])
        return out

    def _nonzero(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not args[0].is_meta:
            return NotImplemented
        return self._sized(func, args, self._device_integers(self._rows_of(args[0])))

    def _masked_select(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not args[0].is_meta:
            return NotImplemented
        out = torch.empty(len(self._rows_of(args[1])), dtype=args[0].dtype, device=META)
        return self._sized(func, args, out)

    def _repeat_interleave(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not args[0].is_meta:
            return NotImplemented
        values = self._values(args[0])
        if kwargs.get("output_size") is None:
            self.record_sync("repeat_interleave")
        out = self._device_integers(torch.repeat_interleave(values))
        self._count(func, args, args[:1], [out])
        return out

    def _equal(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not args[0].is_meta:
            return NotImplemented
        self.record_sync("equal")
        return torch.equal(self._values(args[0]), self._values(args[1]))

    def _index(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an index with masks as CUDA does: the host reads how many rows a mask keeps; host indices are copied."""
        x, indices = args[0], args[1]
        if not x.is_meta:
            return NotImplemented
        if func is not aten.index.Tensor and puts_number(args, kwargs):
            # CUDA turns a number that is put where a mask is set into masked_fill_, which waits for nothing.
            mask = next(index for index in indices if index is not None)
            mask = mask.view(mask.shape + (1,) * (x.dim() - mask.dim()))
            return self._run(aten.masked_fill_.Scalar, (x, mask, 0), {}, [x, mask])
        resolved: list[Tensor | None] = []
        for index in indices:
            if index is not None and not index.is_meta:
                self._record_copy_to_device(index, False)
                index = self._device_integers(index)
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.record_sync("nonzero")
                resolved += [self._device_integers(column) for column in self._rows_of(index).unbind(1)]
            else:
                resolved.append(index)
        args = (x, resolved, *args[2:])
        tensors = tensors_of(args, kwargs)
        self._check_devices(func, tensors)
        return self._run(func, args, kwargs, tensors)

    # -- pinned memory ---------------------------------------------------------------------------------------------

    def _allocate_pinned(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        self._track(self.host, out)
        self._pin(out)
        return out

    def _pin(self, x: Tensor) -> None:
        key = x.untyped_storage()._cdata
        self._pinned.add(key)
        weakref.finalize(x.untyped_storage(), self._pinned.discard, key).atexit = False
