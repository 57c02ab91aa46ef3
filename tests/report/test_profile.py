"""The summary of a trace against a trace written by hand."""

from icegrt.report import profile


def span(name, category, start, duration, tid=1):
    return {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": tid, "ts": start, "dur": duration}


def memory(time, total, device=0):
    return {
        "ph": "i",
        "name": "[memory]",
        "ts": time,
        "args": {"Total Allocated": total, "Device Type": device, "Bytes": 0},
    }


#          0         1000                2000       3000          4000
# main:    |rollout: mm(200..600)        |update: mm(2100..2900: add 2200..2300)  |
# other:    add 500..1500 (another thread: no part of the main thread's work)
TRACE = {
    "traceEvents": [
        span("iteration 1", "user_annotation", 0, 4000),
        span("rollout", "user_annotation", 0, 1000),
        span("update", "user_annotation", 2000, 1000),
        span("mm", "cpu_op", 200, 400),
        span("mm", "cpu_op", 2100, 800),
        span("add", "cpu_op", 2200, 100),
        span("add", "cpu_op", 500, 1000, tid=2),
        {"ph": "M", "name": "process_name", "pid": 7},
        memory(100, 10),
        memory(300, 50),
        memory(600, 20),
        memory(2500, 90),
        memory(2800, 30),
    ]
}


def test_self_time_leaves_out_what_is_inside():
    rows = {row.name: row for row in profile.self_totals(profile.spans(TRACE, "cpu_op"))}
    assert (rows["mm"].calls, rows["mm"].microseconds) == (2, 400 + 800 - 100)
    assert (rows["add"].calls, rows["add"].microseconds) == (2, 100 + 1000)


def test_gaps_are_what_no_span_covers():
    ranges = profile.spans(TRACE, "user_annotation")
    main = [span for span in profile.spans(TRACE, "cpu_op") if span.track == (7, 1)]
    gaps = profile.idle_gaps(main, ranges, 0, 4000)
    assert [(gap.start, gap.duration, gap.inside) for gap in gaps] == [
        (0, 200, "rollout"),
        (600, 1500, "rollout"),
        (2900, 1100, "update"),
    ]
    assert sum(gap.duration for gap in gaps) == 4000 - 400 - 800


def test_intervals_that_touch_or_overlap_are_one():
    kernels = [profile.Span("k", (0, stream), start, end) for start, end, stream in ((0, 5, 1), (3, 4, 2), (5, 8, 2))]
    assert profile.busy_intervals(kernels) == [(0, 8)]
    assert profile.idle_gaps(kernels, [], 0, 10) == [profile.Gap(8, 2, "(no range)")]


def test_memory_has_the_peak_of_each_range():
    ranges = profile.spans(TRACE, "user_annotation")
    rows = {row.name: (row.first, row.peak, row.last) for row in profile.memory_by_range(TRACE, ranges)}
    assert rows["rollout"] == (10, 50, 20)
    assert rows["update"] == (20, 90, 30)


def test_the_device_comes_before_the_cpu():
    device = [
        span("gemm", "kernel", 100, 900, tid=20),
        span("copy", "gpu_memcpy", 1500, 500, tid=21),
        memory(200, 1 << 20, device=1),
    ]
    text = profile.summary_text({"traceEvents": [*TRACE["traceEvents"], *device]})
    assert "Kernels and copies of the device" in text and "gemm" in text
    assert "Operators" not in text
    assert "Idle: 2.6 ms, 65.0% (no kernel or copy on the device)" in text  # 4.0 - 0.9 - 0.5
    # The allocations of the CPU do not count: update has none of the device.
    assert text.split("peak")[1].split()[1:] == ["iteration", "1", *["1.0"] * 3, "rollout", *["1.0"] * 3]


def test_the_summary_has_ranges_operators_gaps_and_memory():
    text = profile.summary_text(TRACE)
    assert "Profiled: 4.0 ms" in text
    assert "Idle: 2.8 ms, 70.0% (the main thread outside of operators)" in text
    assert [part for part in ("Ranges", "Operators", "Longest gaps", "Memory allocated") if part not in text] == []
    assert profile.summary_text({"traceEvents": []}) == "The trace has no range.\n"
