"""Adam in host memory: master weights and moments stay there, and the steps are taken there.

Megatron 0.16 has a HybridDeviceOptimizer. It keeps a second copy of the master weights on the device, allocates all
host memory again when a state is loaded, in pinned blocks of powers of two, and moves nothing that is not `is_cuda`. We
give Megatron's distributed optimizer another Adam instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icegrt.residency import HostMemory

_FP32_BYTES = 4


class Shard:
    """The part of a parameter that this rank's optimizer updates.

    Megatron's gradient norm and clipping take it for the parameter, so both run on the device.

    Attributes:
        weight: view of the parameter on the device, [N].
        grad: view of its complete gradient on the device, [N] fp32.
        master, host_grad: weight and gradient on the host, [N] fp32.
    """

    def __init__(self, parameter: Tensor, start: int, stop: int, master: Tensor, host_grad: Tensor) -> None:
        """Take the entries `start` to `stop` of a parameter that Megatron's DDP has wrapped."""
        from megatron.core.tensor_parallel import copy_tensor_model_parallel_attributes

        main_grad: Any = parameter.main_grad  # type: ignore[attr-defined]
        self.weight = parameter.detach().view(-1)[start:stop]
        self.grad = main_grad.view(-1)[start:stop]
        self.master, self.host_grad = master, host_grad
        copy_tensor_model_parallel_attributes(self, parameter)
        self.shared = getattr(parameter, "shared", False)


class HostAdam(torch.optim.AdamW):
    """AdamW over master weights on the host.

    On a CPU, steps have the bits of torch's AdamW there. For a GPU torch's fused kernel for processors takes them.

    Args:
        host: the memory that holds the states; it stays as long as this object.
        groups: parameter groups of Megatron's optimizer, with master weights as "params".
        shards: of all master weights.
        states: two moments per master weight, fp32, zeros.
    """

    def __init__(
        self,
        host: HostMemory,
        groups: list[dict[str, Any]],
        shards: Sequence[Shard],
        states: dict[Tensor, list[Tensor]],
    ) -> None:
        super().__init__(groups)
        self.host = host
        self.shards = list(shards)
        is_fused = self.shards[0].weight.device.type != "cpu" if self.shards else None
        for group in self.param_groups:
            group["foreach"], group["fused"] = None, is_fused or None
        for master, (first, second) in states.items():
            self.state[master] = {"step": torch.zeros(()), "exp_avg": first, "exp_avg_sq": second}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Copy the gradients to the host and take a step there. The host waits for the device once."""
        to_host([(shard.host_grad, shard.grad) for shard in self.shards])
        for shard in self.shards:
            shard.master.grad = shard.host_grad
        self.step_on_host()

    def step_on_host(self) -> None:
        """Take a step along the gradients that are on the host."""
        super().step()

    @torch.no_grad()
    def write_weights(self) -> None:
        """Copy the master weights to the parameters on the device, in the dtype of these."""
        to_device([(shard.weight, shard.master) for shard in self.shards])


def to_host(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair, of the device, to the first, of the host; wait until the data is there."""
    for host, device in copies:
        host.copy_(device, non_blocking=True)
    if copies and copies[0][1].is_cuda:
        torch.cuda.current_stream(copies[0][1].device).synchronize()


def to_device(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair, of the host, to the first, of the device, which may have another dtype."""
    for device, host in copies:
        # The device converts: the host would do so in memory that is not pinned, and wait for every copy.
        device.copy_(host.to(device.device, non_blocking=True))


def move_to_host(optimizer: Any, host: HostMemory) -> None:
    """Let a `HostAdam` replace the Adam of Megatron's distributed optimizer, before its first step.

    Host memory is 16 bytes per entry: weight, gradient and two moments. On the device stay parameters and gradients.

    Args:
        optimizer: a distributed optimizer whose groups list fp32 parameters before others.
        host: where the state is allocated.

    Raises:
        RunError: the host has too little memory.
    """
    fp32, float16 = optimizer.model_fp32_groups, optimizer.model_float16_groups
    grouped = [[*some, *others] for some, others in zip(fp32, float16, strict=True)]
    parameters = [parameter for group in grouped for parameter in group]
    ranges = [optimizer._get_model_param_range_map(parameter)["param"] for parameter in parameters]
    sizes = [_FP32_BYTES * span.size for span in ranges]
    # One kind of state after another: masters, gradients, first moments, second moments.
    tensors = [block.view(torch.float32) for block in host.allocate_each(sizes * 4)]
    kinds = [tensors[index :: len(sizes)] for index in range(len(sizes))]
    shards = [
        Shard(parameter, span.start, span.end, master, grad)
        for parameter, span, (master, grad, *_) in zip(parameters, ranges, kinds, strict=True)
    ]
    to_host([(shard.master, shard.weight) for shard in shards])
    masters = iter([shard.master for shard in shards])
    groups = [
        {**group, "params": [next(masters) for _ in some]}
        for group, some in zip(optimizer.optimizer.param_groups, grouped, strict=True)
    ]
    optimizer.optimizer = HostAdam(host, groups, shards, {master: moments for master, _, *moments in kinds})
    _forget_device_masters(optimizer)
    # Gradients stay where they are until the step, and Megatron's copy loops expect masters on the device.
    optimizer.get_parameters = optimizer.optimizer.shards.copy
    optimizer._copy_model_grads_to_main_grads = _nothing
    optimizer._copy_main_params_to_model_params = optimizer.optimizer.write_weights


def _nothing() -> None:
    pass


def _forget_device_masters(optimizer: Any) -> None:
    """Let all references of Megatron to master weights name those on the host."""
    groups = zip(
        optimizer.optimizer.param_groups,
        optimizer.opt_group_ranges,
        optimizer.model_float16_groups,
        optimizer.shard_fp32_groups,
        optimizer.shard_fp32_from_float16_groups,
        strict=True,
    )
    for group, group_range, float16, shards, shards_from_float16 in groups:
        masters = group["params"]
        group_range["orig_group"]["params"] = masters
        shards[:] = masters[: len(shards)]
        shards_from_float16[:] = masters[len(shards) :]
        for parameter, master in zip(float16, shards_from_float16, strict=True):
            parameter.main_param = master
