"""The plan as a document for --json and --out, and as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from icegrt.config.loader import as_dict
from icegrt.planning.cost import Cost
from icegrt.planning.footprint import RankMemory, run_peaks
from icegrt.planning.plan import Plan, Proposal
from icegrt.rehearsal.hardware import RESERVED
from icegrt.utils import console
from icegrt.utils.files import json_safe

FORMAT = 1


def document(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values: bytes, FLOPs, and seconds that order proposals."""
    return {
        "kind": "plan: rehearsed peaks of memory; nothing was measured",
        "format": FORMAT,
        "gpus": plan.cluster.gpus,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "memory_bytes": int(plan.hardware.memory_bytes),
        "usable_bytes": plan.hardware.usable_bytes,
        "workload": plan.workload.description,
        "fits": plan.fits,
        "device_bytes": plan.base.device_bytes,
        "peaks": run_peaks(plan.base.ranks),
        "ranks": [_rank_document(rank) for rank in plan.base.ranks],
        "cost": None if plan.cost is None else vars(plan.cost),
        "proposals": [_proposal_document(proposal) for proposal in plan.proposals],
        "rehearsed": plan.rehearsed,
        "config": json_safe(as_dict(plan.config)),
    }


def _rank_document(rank: RankMemory) -> dict[str, Any]:
    return {
        "kind": rank.kind,
        "rank": rank.rank,
        "device_bytes": rank.device_bytes,
        "host_bytes": rank.host_bytes,
        "phases": {
            name: {"device": vars(phase.device), "host": vars(phase.host)} for name, phase in rank.phases.items()
        },
    }


def _proposal_document(proposal: Proposal) -> dict[str, Any]:
    return {
        "keys": {f"ppo.{name}": value for change in proposal.candidate.changes for name, value in change.keys},
        "device_bytes": proposal.candidate.device_bytes,
        "ranks": [_rank_document(rank) for rank in proposal.candidate.ranks],
        "cost": vars(proposal.cost),
        "extra": vars(proposal.extra),
    }


def to_json(plan: Plan) -> str:
    """Return the plan as indented JSON."""
    return json.dumps(document(plan), indent=2)


# -- text --------------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    """Print the plan as tables."""
    memory, usable = plan.hardware.memory_bytes / 1e9, plan.hardware.usable_bytes / 1e9
    _line(
        f"plan for {plan.cluster.gpus} GPUs of {memory:.1f} GB, of which {usable:.1f} are usable ({RESERVED:.0%} are "
        "left for CUDA, NCCL and gaps); rehearsed, not measured"
    )
    _line(f"lengths: {plan.workload.description}")
    for rank in plan.base.ranks:
        _print_rank(rank)
    verdict = "fits" if plan.fits else "does not fit"
    _line(f"\nlargest peak {_gb(plan.base.device_bytes)} of {usable:.1f} GB usable: {verdict}")
    if plan.fits:
        return
    if not plan.proposals:
        _line(f"no change that was tried makes it fit (configurations rehearsed: {plan.rehearsed})")
        return
    _line("\nchanges that make it fit, the cheapest first; costs of an iteration per GPU, beyond the configuration's\n")
    headers = ["changes", "peak GB", "host GB", "PFLOP", "host copies GB", "collectives GB", "GB moved"]
    console.table(headers, [_proposal_row(proposal) for proposal in plan.proposals])


def _print_rank(rank: RankMemory) -> None:
    _line(f"\n{rank.kind} (rank {rank.rank}): peak {_gb(rank.device_bytes)} GB, host {_gb(rank.host_bytes)} GB\n")
    names = _used([phase.device.by_category for phase in rank.phases.values()])
    rows = []
    for name, phase in rank.phases.items():
        parts = [_gb(phase.device.by_category.get(category, 0)) for category in names]
        rows.append([name, _gb(phase.device.bytes), *parts, _gb(phase.host.bytes)])
    console.table(["phase", "peak GB", *names, "host GB"], rows)


def _used(parts: Sequence[dict[str, int]]) -> list[str]:
    """Return the categories that occur, in the order of their table."""
    return list(dict.fromkeys(name for part in parts for name in part))


def _proposal_row(proposal: Proposal) -> list[str]:
    candidate, extra = proposal.candidate, proposal.extra
    return [
        " ".join(map(str, candidate.changes)),
        _gb(candidate.device_bytes),
        _gb(max(rank.host_bytes for rank in candidate.ranks)),
        *_cost_cells(extra),
    ]


def _cost_cells(cost: Cost) -> list[str]:
    return [
        f"{cost.flops / 1e15:+.3g}",
        f"{cost.host_bytes / 1e9:+.3g}",
        f"{cost.collective_bytes / 1e9:+.3g}",
        f"{cost.memory_bytes / 1e9:+.3g}",
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _line(text: str) -> None:
    print(text, flush=True)
