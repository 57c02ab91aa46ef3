"""Models: a Hugging Face architecture as a Megatron-core trunk with a head, weights in and out."""

from icegrt import cpu
from icegrt.cluster import hide_megatron_warnings

hide_megatron_warnings()
cpu.import_megatron()


def selftest() -> str:
    """A forward pass through a tiny trunk on this machine's device; says what ran. Raises what went wrong."""
    from icegrt.model.forward_check import run

    return run()
