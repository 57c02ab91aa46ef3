"""What pipeline stages send each other: every stage has the same micro-batches, so no shape needs a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icegrt.packing import PackedBatch


def known_shapes(batches: Sequence[PackedBatch], config: Any) -> dict[str, Any]:
    """Return options of Megatron's schedule with which stages know the shapes that they receive.

    Megatron 0.16: with sequences of any length, each message is preceded by one with its shape, after which the host
    waits for the device. The communicator that we pass reads the shapes from the micro-batches.

    Args:
        batches: in the order of the pass, the same on all stages.
        config: Megatron's TransformerConfig.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection

    if config.pipeline_model_parallel_size == 1:
        return {}
    rows_divisor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    shapes = [(batch.n_tokens // rows_divisor, 1, config.hidden_size) for batch in batches]
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    hidden_shapes = iter([shapes[n] for n in _arrivals(len(shapes), config, is_end=pipeline.rank() == 0)])
    is_last = pipeline.rank() == pipeline.size() - 1
    gradient_shapes = iter([shapes[n] for n in _arrivals(len(shapes), config, is_end=is_last)])

    class Communicator(P2PCommunicator):
        def _communicate_shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
            return next(hidden_shapes) if recv_prev else None, next(gradient_shapes) if recv_next else None

    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = pipeline
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"p2p_communicator": Communicator(groups.pp, config), "pg_collection": groups}


def _arrivals(count: int, config: Any, *, is_end: bool) -> list[int]:
    """Return the indices of the micro-batches whose tensors a rank receives from one side, in the order of arrival.

    Args:
        count: number of micro-batches.
        config: Megatron's TransformerConfig.
        is_end: whether the pipeline ends at that side: interleaved stages then receive from its other end.
    """
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    stages = config.virtual_pipeline_model_parallel_size
    if stages is None:
        return list(range(count))
    # Every rank computes, and so sends, in the order of this table; gradients have the same order of micro-batches.
    table = get_schedule_table(count, stages, config.microbatch_group_size_per_vp_stage)
    # The output of the last stage goes nowhere, and neither does the gradient of the first one.
    return [number for number, stage in table if not (is_end and stage == stages - 1)]
