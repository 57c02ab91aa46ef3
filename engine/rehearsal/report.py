"""The report of a rehearsal: as a document for --json, and as tables."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from icegrt.rehearsal.bounds import ASSUMPTIONS, Bound, bound_of
from icegrt.rehearsal.counts import TO_DEVICE, TO_HOST, PhaseCounts, Total
from icegrt.rehearsal.hardware import RESERVED
from icegrt.rehearsal.memory import Peak
from icegrt.rehearsal.phases import BUILD, DECODE, PHASES
from icegrt.rehearsal.process_groups import SOCKETS_PER_COMMUNICATOR, STORE_CONNECTIONS, sockets_of
from icegrt.rehearsal.rehearsal import RankRehearsal, Rehearsal
from icegrt.utils import console

_TOP = 8  # lines of a list of places


def document(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return the report as JSON values. Seconds are lower bounds; all other numbers are counts, bytes or FLOPs."""
    config, hardware = rehearsal.config, rehearsal.hardware
    return {
        "kind": "rehearsal: counts of a run on the meta device; nothing was measured",
        "gpus": rehearsal.gpus,
        "gpus_per_node": rehearsal.gpus_per_node,
        "layout": {
            "tensor": rehearsal.layout.tensor,
            "pipeline": rehearsal.layout.pipeline,
            "data": rehearsal.data_parallel,
            "sequence_parallel": rehearsal.layout.sequence_parallel,
        },
        "hardware": vars(hardware) | {"usable_bytes": hardware.usable_bytes},
        "workload": {
            "description": rehearsal.workload.description,
            "prompts": len(rehearsal.workload.prompts),
            "responses": len(rehearsal.workload.responses),
            "prompt_tokens": sum(rehearsal.workload.prompts),
            "response_tokens": sum(rehearsal.workload.responses),
            "decode_steps_rehearsed": rehearsal.workload.decode_steps,
            "longest_response": max(rehearsal.workload.responses),
            "decode_batches_per_rank": rehearsal.batches_per_rank,
        },
        "token_budget": config.token_budget,
        "ranks": [_rank_document(rehearsal, rank) for rank in rehearsal.ranks],
        "assumptions": list(assumptions(rehearsal)),
    }


def _rank_document(rehearsal: Rehearsal, rank: RankRehearsal) -> dict[str, Any]:
    counts, watcher = rank.counts, rank.counts.watcher
    peak = watcher.device.peak()
    useful = 1 - counts.tail_tokens / max(counts.tokens, 1)
    phases = {
        name: _phase_document(rehearsal, rank, watcher.phases[name], useful)
        for name in PHASES
        if name in watcher.phases
    }
    if DECODE in phases:
        phases[DECODE]["steps"] = rehearsal.workload.decode_steps
    return {
        "kind": rank.kind,
        "rank": rank.rank,
        "parameters": counts.parameters,
        "chunk_rows": counts.chunk_rows,
        "micro_batches": counts.micro_batches,
        "tokens": counts.tokens,
        "tail_tokens": counts.tail_tokens,
        "sequences_decoded_together": counts.sequences,
        "phases": phases,
        "peak_device_memory": _peak_document(peak),
        "peak_host_bytes": watcher.host.peak().bytes,
        "fits": peak.bytes <= rehearsal.hardware.usable_bytes,
        "iteration_lower_bound_seconds": sum(bound.seconds for bound in iteration_bounds(rehearsal, rank).values()),
        "process_groups": [
            {"name": g.name, "ranks": len(g.ranks), "used": g.is_used, "sockets": g.sockets} for g in counts.groups
        ],
        "sockets": sockets_of(counts.groups),
    }


def _phase_document(rehearsal: Rehearsal, rank: RankRehearsal, phase: PhaseCounts, useful: float) -> dict[str, Any]:
    watcher = rank.counts.watcher
    executed, recomputed = sum(phase.product_flops.values()), sum(phase.recomputed_flops.values())
    bound = bound_of(phase, rehearsal.hardware, rehearsal.gpus_per_node)
    return {
        "launches": phase.launched,
        "launches_by_operator": dict(_by_operator(phase).most_common()),
        "synchronisations": phase.synced,
        "synchronisations_by_line": [
            {"reason": reason, "line": str(site), "count": count} for (reason, site), count in phase.syncs.most_common()
        ],
        "copies": [
            {
                "direction": copy.direction,
                "line": str(copy.site),
                "pinned": copy.is_pinned,
                "blocking": copy.is_blocking,
                "count": total.count,
                "bytes": total.bytes,
            }
            for copy, total in phase.copies.items()
        ],
        "product_flops": executed,
        "useful_flops": int((executed - recomputed) * useful),
        "vector_flops": phase.vector_flops,
        "bytes_read": phase.bytes_read,
        "bytes_written": phase.bytes_written,
        "collectives": [
            {"op": t.op, "group": t.group, "ranks": len(t.ranks), "count": total.count, "bytes": total.bytes}
            for t, total in phase.transfers.items()
        ],
        "peak_device_memory": _peak_document(watcher.device.largest_peak(span[:2] for span in phase.spans)),
        "peak_host_bytes": watcher.host.largest_peak(span[2:] for span in phase.spans).bytes,
        "lower_bound": vars(bound) | {"seconds": bound.seconds, "limit": bound.limit},
    }


def _peak_document(peak: Peak) -> dict[str, Any]:
    return {
        "bytes": peak.bytes,
        "by_category": peak.by_category,
        "largest": [
            {"bytes": block.bytes, "category": block.category, "line": str(block.site)} for block in peak.largest[:_TOP]
        ],
    }


def _by_operator(phase: PhaseCounts) -> Counter[str]:
    counter: Counter[str] = Counter()
    for (operator, _), count in phase.launches.items():
        counter[operator] += count
    return counter


def iteration_bounds(rehearsal: Rehearsal, rank: RankRehearsal) -> dict[str, Bound]:
    """Return the lower bound of each phase of a whole iteration: all batches of a rank, all decode steps of each."""
    return {
        name: bound_of(counts, rehearsal.hardware, rehearsal.gpus_per_node).times(rehearsal.repetitions(name))
        for name, counts in rank.counts.watcher.phases.items()
        if name != BUILD
    }


def assumptions(rehearsal: Rehearsal) -> Iterator[str]:
    """Yield what the counts and bounds assume."""
    workload, hardware = rehearsal.workload, rehearsal.hardware
    yield f"Lengths: {workload.description}."
    yield (
        f"The rollout's first batch is rehearsed: its prefill and {workload.decode_steps} decode steps with all "
        f"sequences. The iteration's bound takes every step of {rehearsal.batches_per_rank} batches for one of these."
    )
    yield (
        f"{hardware.name}: {hardware.memory_bytes / 1e9:.0f} GB, of which {RESERVED:.0%} are left for the CUDA "
        f"context, NCCL and gaps; {hardware.bf16_flops / 1e12:.0f} TFLOP/s bf16, {hardware.fp32_flops / 1e12:.1f} "
        f"fp32; memory {hardware.memory_bandwidth / 1e12:.2f} TB/s, links {hardware.link_bandwidth / 1e9:.0f} GB/s, "
        f"network {hardware.network_bandwidth / 1e9:.0f} GB/s, host {hardware.host_bandwidth / 1e9:.0f} GB/s, launch "
        f"{hardware.launch_seconds * 1e6:.0f} us. Source: {hardware.source}."
    )
    yield (
        "Attention runs on flash-attn, in half precision. Operators of PyTorch launch one kernel, but for multi-tensor "
        "operators, scans and sorts. Launches of NCCL are not counted."
    )
    yield (
        f"Sockets: {SOCKETS_PER_COMMUNICATOR} for each group of NCCL that communicates (root and ring of its "
        f"bootstrap), {STORE_CONNECTIONS} to the store."
    )
    yield from ASSUMPTIONS


# -- text ------------------------------------------------------------------------------------------------------------


def to_json(rehearsal: Rehearsal) -> str:
    """Return the report as indented JSON."""
    return json.dumps(document(rehearsal), indent=2)


def print_report(rehearsal: Rehearsal) -> None:
    """Print the report as tables."""
    report = document(rehearsal)
    layout = report["layout"]
    _line(
        f"rehearsal on {rehearsal.gpus} x {rehearsal.hardware.name} (tensor {layout['tensor']} x pipeline "
        f"{layout['pipeline']} x data {layout['data']}): counts of the engine on the meta device; nothing was measured"
    )
    for rank in report["ranks"]:
        _print_rank(rehearsal, rank)
    _line("\nassumptions")
    for text in report["assumptions"]:
        _line(f"* {text}")


def _print_rank(rehearsal: Rehearsal, rank: dict[str, Any]) -> None:
    # 1. Counts by phase.
    _line(f"\n{rank['kind']} (rank {rank['rank']}): {_si(rank['parameters'])} parameters over all roles\n")
    headers = [
        "phase", "launches", "syncs", "to device", "to host", "PFLOP", "useful", "GB moved", "GB sent", "peak GB",
        "host GB", "bound s", "limit",
    ]  # fmt: skip
    console.table(headers, [_row(name, phase) for name, phase in rank["phases"].items()])
    _line(
        "to device and to host count copies, the blocking ones after the slash; sent counts the tensors of collectives"
    )
    # 2. Memory.
    peak = rank["peak_device_memory"]
    usable = rehearsal.hardware.usable_bytes
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in peak["by_category"].items() if size)
    verdict = "fits" if rank["fits"] else "does not fit"
    _line(f"\npeak device memory {peak['bytes'] / 1e9:.2f} GB of {usable / 1e9:.1f} usable: {verdict} ({parts})")
    for block in peak["largest"][:3]:
        _line(f"  {block['bytes'] / 1e9:.2f} GB {block['category']}: {block['line']}")
    # 3. Places.
    _print_places("host waits for the device", rank, _sync_places)
    _print_places("blocking copies", rank, _blocking_places)
    # 4. Groups.
    used = [group for group in rank["process_groups"] if group["used"]]
    _line(
        f"\nprocess groups: {len(rank['process_groups'])}, of which {len(used)} communicate; sockets {rank['sockets']}"
    )
    console.table(["group", "collective", "ranks", "count", "GB"], _collective_rows(rank))
    _line(
        f"\nlower bound of an iteration: {rank['iteration_lower_bound_seconds']:.3g} s (no measurement, and no "
        "prediction: see the assumptions)"
    )


def _row(name: str, phase: dict[str, Any]) -> list[str]:
    def copies(direction: str) -> str:
        chosen = [copy for copy in phase["copies"] if copy["direction"] == direction]
        blocking = sum(copy["count"] for copy in chosen if copy["blocking"])
        return f"{sum(copy['count'] for copy in chosen)}/{blocking}"

    bound = phase["lower_bound"]
    return [
        f"{name} ({phase['steps']} steps)" if "steps" in phase else name,
        f"{phase['launches']:,}",
        f"{phase['synchronisations']:,}",
        copies(TO_DEVICE),
        copies(TO_HOST),
        f"{phase['product_flops'] / 1e15:.3g}",
        f"{phase['useful_flops'] / max(phase['product_flops'], 1):.0%}",
        f"{(phase['bytes_read'] + phase['bytes_written']) / 1e9:.3g}",
        f"{sum(c['bytes'] for c in phase['collectives']) / 1e9:.3g}",
        f"{phase['peak_device_memory']['bytes'] / 1e9:.2f}",
        f"{phase['peak_host_bytes'] / 1e9:.2f}",
        f"{bound['seconds']:.3g}",
        bound["limit"],
    ]


def _print_places(title: str, rank: dict[str, Any], places: Callable[[dict[str, Any]], Iterator[Any]]) -> None:
    totals: dict[tuple[str, str], Total] = defaultdict(Total)
    for name, phase in rank["phases"].items():
        if name != BUILD:
            for text, count, size in places(phase):
                totals[name, text].add(size, count)
    if not totals:
        _line(f"\n{title}: none after the set-up")
        return
    _line(f"\n{title}, most frequent first")
    ordered = sorted(totals.items(), key=lambda item: -item[1].count)
    for (name, text), total in ordered[:_TOP]:
        size = f", {_si(total.bytes)}B" if total.bytes else ""
        _line(f"  {total.count} x {name}: {text}{size}")
    if len(ordered) > _TOP:
        _line(f"  and {len(ordered) - _TOP} more lines (--json lists all)")


def _sync_places(phase: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    for sync in phase["synchronisations_by_line"]:
        yield f"{sync['reason']} {sync['line']}", sync["count"], 0


def _blocking_places(phase: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    for copy in phase["copies"]:
        if copy["blocking"] and copy["direction"] == TO_DEVICE:
            yield f"{copy['direction']} {copy['line']}", copy["count"], copy["bytes"]


def _collective_rows(rank: dict[str, Any]) -> list[list[str]]:
    totals: dict[tuple[str, str, int], Total] = defaultdict(Total)
    for name, phase in rank["phases"].items():
        if name != BUILD:
            for c in phase["collectives"]:
                totals[c["group"], c["op"], c["ranks"]].add(c["bytes"], c["count"])
    ordered = sorted(totals.items(), key=lambda item: -item[1].bytes)
    return [
        [group, op, str(ranks), f"{total.count:,}", f"{total.bytes / 1e9:.3g}"] for (group, op, ranks), total in ordered
    ]


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}".strip() if unit else f"{number:.0f} "
        number /= 1000
    return f"{number:.3g} P"


def _line(text: str) -> None:
    print(text, flush=True)
