"""What pipeline stages send each other: every stage has the same micro-batches, so no shape needs a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icegrt.packing import PackedBatch


def known_shapes(batches: Sequence[PackedBatch], config: Any) -> dict[str, Any]:
    """Return options of Megatron's schedule with which stages know the shapes that they receive.

    Megatron 0.16: with sequences of any length, each message is preceded by one with its shape, after which the host
    waits for the device. The communicator that we pass reads the shapes from the micro-batches. Interleaved stages
    receive in another order and still send shapes.

    Args:
        batches: in the order of the pass, the same on all stages.
        config: Megatron's TransformerConfig.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection

    if config.pipeline_model_parallel_size == 1 or config.virtual_pipeline_model_parallel_size is not None:
        return {}
    rows_divisor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    shapes = [(batch.n_tokens // rows_divisor, 1, config.hidden_size) for batch in batches]
    # Hidden states arrive in the order of the micro-batches, and so do their gradients.
    hidden_shapes, gradient_shapes = iter(shapes), iter(shapes)

    class Communicator(P2PCommunicator):
        def _communicate_shapes(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
            return next(hidden_shapes) if recv_prev else None, next(gradient_shapes) if recv_next else None

    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"p2p_communicator": Communicator(groups.pp, config), "pg_collection": groups}
