"""Keep state of roles in host memory while the roles are not in use."""

from icegrt.residency.copies import Copies
from icegrt.residency.host_memory import HostMemory
from icegrt.residency.layers import LayerParts
from icegrt.residency.part import Part
from icegrt.residency.residency import ENDS, GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, Kind, Placement, Residency

__all__ = [
    "ENDS",
    "GRADIENTS",
    "KINDS",
    "OPTIMIZER",
    "PARAMETERS",
    "Copies",
    "HostMemory",
    "Kind",
    "LayerParts",
    "Part",
    "Placement",
    "Residency",
]
