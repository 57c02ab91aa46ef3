"""The rollout engine beside transformers' generate at several static batches, on answers of given lengths.

Models have random weights, and no stop token is ever sampled. A static batch is padded on the left and runs to the
longest of its answers. The case with 8 samples per prompt compares shared blocks with samples that are requests of
their own. Targets are printed: 4.5 times transformers at its best batch in the long tail, 2 times with shared blocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import GenerationConfig

from bench import harness
from bench.rollout.workloads import SHAPES, Workload, random_model, workloads
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.load import load_actor
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Sampling

STATIC_BATCHES = {"4x256": (16, 32, 64, 128), "135M": (32, 128)}
WARM_UP_TOKENS = 4
QUICK_SCALE = 4
TARGET_TAIL, TARGET_SHARED = 4.5, 2.0
COPY_BYTES = 1 << 27


@dataclass
class Trace:
    """What a run of the engine did, step by step.

    Attributes:
        running: sequences that sampled.
        milliseconds: of the step.
        lengths: mean number of tokens of the sequences that sampled.
        kv_read_by_step: bytes of keys and values that attention of decodes has read in the step.
        rows: rows through the trunk in all.
        kv_bytes: largest number of bytes in blocks that sequences held.
        wasted: share of those bytes that held no token.
    """

    running: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    kv_read_by_step: list[int] = field(default_factory=list)
    rows: int = 0
    kv_bytes: int = 0
    wasted: float = 0.0

    @property
    def kv_read(self) -> int:
        """Bytes of keys and values that attention of decodes has read in all."""
        return sum(self.kv_read_by_step)

    def add(self, decoder: Decoder, seconds: float) -> None:
        """Record a step that is complete."""
        self.running.append(decoder.n_unfinished)
        self.milliseconds.append(1e3 * seconds)
        storage = decoder.storage
        assert storage is not None
        group = storage.groups[0]
        scheduler, size = group.scheduler, group.scheduler.block_size
        tokens = [len(s.prompt) + s.n_sampled for s in decoder._sequences.values()]
        self.lengths.append(sum(tokens) / max(1, len(tokens)))
        read = decoder.stats.kv_tokens_read * storage.block_bytes // size
        self.kv_read_by_step.append(read - self.kv_read)
        blocks = scheduler.n_blocks - scheduler.blocks_available
        if blocks * storage.block_bytes > self.kv_bytes:
            self.kv_bytes = blocks * storage.block_bytes
            held = [len(s.prompt) + s.n_sampled - 1 for s in decoder._sequences.values() if s.n_sampled]
            # Sharing makes fewer blocks than lengths: waste is then a bound from below.
            own = sum(-(-length // size) for length in held)
            self.wasted = 1 - sum(held) / (own * size) if own else 0.0


def run_engine(model, workload: Workload, is_shared: bool = True) -> Trace:
    """Answer all prompts with the engine."""
    settings = RolloutSettings(max_batch=256, reuse_prefixes=is_shared)
    decoder = Decoder(model, [model.architecture.vocab_size], settings)
    copies = workload.samples if is_shared else 1
    blocks = sum(
        (len(p) + n) // settings.block_size + 1 for p, n in zip(workload.prompts, workload.lengths, strict=True)
    )
    number = 0
    for prompt, length in zip(workload.prompts, workload.lengths, strict=True):
        sampling = Sampling(max_new_tokens=length, seed=1)
        for _ in range(workload.samples // copies):
            decoder.submit(
                [prompt], copies, sampling, first_sequence_id=number, blocks_wanted=blocks * workload.samples
            )
            number += copies
    trace = Trace()
    while decoder.n_unfinished:
        begin = time.perf_counter()
        decoder.step()
        trace.add(decoder, time.perf_counter() - begin)
    assert decoder.stats.sampled_tokens == workload.n_tokens
    trace.rows = decoder.stats.rows
    return trace


def run_transformers(hf, workload: Workload, batch: int) -> Trace:
    """Answer all prompts in static batches, in the order of submission."""
    requests = [
        (p, n) for p, n in zip(workload.prompts, workload.lengths, strict=True) for _ in range(workload.samples)
    ]
    rows = 0
    for start in range(0, len(requests), batch):
        part = requests[start : start + batch]
        width, new = max(len(p) for p, _ in part), max(n for _, n in part)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in part], device=hf.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in part], device=hf.device)
        config = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
        given = hf.generate(ids, attention_mask=mask, generation_config=config)
        assert given.shape[1] == width + new
        rows += len(part) * (width + new - 1)
    return Trace(rows=rows)


def copy_bandwidth(device: str) -> float:
    """Return bytes per second that a copy reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * COPY_BYTES / min(seconds)


def timed(
    providers: dict[str, Callable[[Workload], Trace]], workload: Workload, rounds: int
) -> tuple[dict[str, list[float]], dict[str, Trace]]:
    """Return the seconds of every round, providers in turn, and the last trace of each."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    traces: dict[str, Trace] = {}
    # Short answers compile kernels and fill caches.
    short = replace(workload, lengths=[min(length, WARM_UP_TOKENS) for length in workload.lengths])
    for run in providers.values():
        run(short)
    for _ in range(rounds):
        for name, run in providers.items():
            begin = time.perf_counter()
            traces[name] = run(workload)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds, traces


def measure(shape: str, dtype: torch.dtype, workload: Workload, options) -> list[dict]:
    """Return the rows of a case, and print them beside the targets."""
    hf = random_model(shape, dtype).to(options.device)
    model = load_actor(hf, dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    providers: dict[str, Callable[[Workload], Trace]] = {"icegrt": lambda work: run_engine(model, work)}
    if workload.samples > 1:
        providers["icegrt, each sample alone"] = lambda work: run_engine(model, work, False)
    count = len(workload.prompts) * workload.samples
    for batch in sorted({min(batch, count) for batch in STATIC_BATCHES[shape]}):
        providers[f"transformers, batch {batch}"] = lambda work, batch=batch: run_transformers(hf, work, batch)
    # Minutes each on a CPU.
    rounds = 1 if options.device == "cpu" and shape == "135M" else options.rounds
    seconds, traces = timed(providers, workload, rounds)
    case = f"{shape} {str(dtype).removeprefix('torch.')} {workload.name}"
    if options.quick:
        case += f", 1 of {QUICK_SCALE} prompts"
    rows = []
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bandwidth = copy_bandwidth(options.device)
    for name, each in seconds.items():
        trace = traces[name]
        metrics = {"throughput": ("tokens/s", [workload.n_tokens / s for s in each]), "rows": ("rows", [trace.rows])}
        if trace.milliseconds:
            floor = (weights * len(trace.running) + trace.kv_read) / bandwidth
            metrics |= {
                "kv_held": ("bytes", [trace.kv_bytes]),
                "kv_wasted": ("share", [trace.wasted]),
                "memory_floor": ("share", [floor / s for s in each]),
            }
        rows += [_row(case, name, metric, unit, samples, options) for metric, (unit, samples) in metrics.items()]
        parts = ", ".join(f"{metric} {statistics.median(x):.4g} {unit}" for metric, (unit, x) in metrics.items())
        print(f"{case:32s} {name:26s} {parts}", flush=True)
    _print_targets(case, workload, seconds)
    if workload.name == "long tail":
        _plot(case, traces["icegrt"], weights, bandwidth, options)
    return rows


def _print_targets(case: str, workload: Workload, seconds: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    best = min((name for name in medians if name.startswith("transformers")), key=medians.__getitem__)
    target = f", target {TARGET_TAIL}" if workload.name == "long tail" else ""
    print(f"{case}: {medians[best] / medians['icegrt']:.2f} times {best}, the best of them{target}")
    alone = medians.get("icegrt, each sample alone")
    if alone:
        print(f"{case}: shared blocks {alone / medians['icegrt']:.2f} times as fast, target {TARGET_SHARED}")


def _row(case: str, provider: str, metric: str, unit: str, samples: list[float], options) -> dict:
    low, middle, high = harness._quantiles(samples)
    return {
        "bench": "rollout",
        "case": case,
        "provider": provider,
        "metric": metric,
        "unit": unit,
        "median": middle,
        "p20": low,
        "p80": high,
        "runs": len(samples),
        "error_vs_fp64": None,
        "peak_bytes": None,
        "floor": None,
        **harness._machine(options.device),
    }


def _plot(case: str, trace: Trace, weights: int, bandwidth: float, options) -> None:
    """Draw throughput over batch and length, and the time of steps beside its floor.

    The floor of a step is the time in which memory is read once: the weights, and the keys and values of decodes.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    floor = [1e3 * (weights + read) / bandwidth for read in trace.kv_read_by_step]
    rate = [1e3 * n / ms for n, ms in zip(trace.running, trace.milliseconds, strict=True)]
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7))
    panels[0, 0].plot(trace.running)
    panels[0, 0].set(xlabel="step", ylabel="running sequences")
    panels[0, 1].scatter(trace.running, rate, s=8)
    panels[0, 1].set(xlabel="batch, sequences", ylabel="tokens/s", ylim=(0, None))
    panels[1, 0].scatter(trace.lengths, rate, s=8, c=trace.running)
    panels[1, 0].set(xlabel="mean length, tokens (colour: batch)", ylabel="tokens/s", ylim=(0, None))
    panels[1, 1].plot(trace.milliseconds, label="step")
    panels[1, 1].plot(floor, label="memory floor")
    panels[1, 1].set(xlabel="step", ylabel="ms", yscale="log")
    panels[1, 1].legend()
    figure.suptitle(f"rollout, {case}")
    figure.tight_layout()
    options.plots.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plots / f"rollout-{case.replace(' ', '-')}.png", dpi=90)
    pyplot.close(figure)


def main() -> None:
    options = harness.arguments(__doc__.splitlines()[0], shapes=tuple(SHAPES), dtypes=("float32", "bfloat16"))
    options.rounds = min(options.rounds, 3)
    options.plots = harness.folder_of(options)
    if options.device == "cpu" and "bfloat16" in options.dtypes and not torch.cpu._is_avx512_bf16_supported():
        print("bf16 is left out: without AVX512_BF16 its matrix products are emulated")
        options.dtypes.remove("bfloat16")
    for shape in options.shapes[:1] if options.quick else options.shapes:
        rows = []
        for dtype in options.dtypes:
            for workload in workloads(QUICK_SCALE if options.quick else 1):
                rows += measure(shape, getattr(torch, dtype), workload, options)
        harness.write(f"rollout_{shape}", rows, options)


if __name__ == "__main__":
    main()
