"""Models: a Hugging Face architecture as a Megatron-core trunk with a head, weights in and out."""

from icegrt.distributed.megatron import hide_megatron_warnings, import_megatron

hide_megatron_warnings()
import_megatron()
