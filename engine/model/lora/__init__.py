"""Low-rank adapters: several on one frozen trunk, selected without copying."""
