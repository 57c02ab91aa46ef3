"""Keep state of roles in host memory while the roles are not in use."""

from icegrt.residency.host_memory import HostMemory
from icegrt.residency.part import Part
from icegrt.residency.residency import GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, Kind, Placement, Residency

__all__ = ["GRADIENTS", "KINDS", "OPTIMIZER", "PARAMETERS", "HostMemory", "Kind", "Part", "Placement", "Residency"]
