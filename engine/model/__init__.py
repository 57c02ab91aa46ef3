"""Models: a Hugging Face architecture as a Megatron-core trunk with a head, weights in and out."""

from icegrt.distributed import cpu_backend as cpu
from icegrt.distributed.cluster import hide_megatron_warnings

hide_megatron_warnings()
cpu.import_megatron()


def selftest() -> str:
    """A forward pass through a tiny trunk on this machine's device; says what ran. Raises what went wrong."""
    from icegrt.model.selftest import run

    return run()
