"""Triton's interpreter with its programs in threads: schedules that the sequential one never takes."""

import contextlib
import inspect
import itertools
import random
import sys
import threading
import time

from triton.runtime import interpreter

JOIN_SECONDS = 60
LONGEST_DELAY = 0.002  # seconds before a store


class Deadlock(AssertionError):
    """Programs still ran after JOIN_SECONDS."""


class _DelayedStores:
    """Triton's interpreted memory with a random pause before each store: programs overtake each other."""

    def __init__(self, memory, order):
        self._memory, self._order = memory, order

    def __getattr__(self, name):
        return getattr(self._memory, name)

    def store(self, *args):
        time.sleep(LONGEST_DELAY * self._order.random())
        return self._memory.store(*args)


@contextlib.contextmanager
def programs_in_threads(seed, workers=4):
    """Run the programs of every launch inside the `with` on `workers` threads, which draw them in random order.

    A program that waits for a flag spins, and the others go on.

    Args:
        seed: Of the order.
        workers: Threads; fewer than the programs that wait for one that was not drawn yet would be a deadlock.
    """
    builder, current, order = type(interpreter.interpreter_builder), threading.local(), random.Random(seed)
    abandoned = threading.Event()

    def launch(executor, *device_args, **keywords):
        accepted = inspect.getfullargspec(executor.fn)
        keywords = {k: v for k, v in keywords.items() if k in accepted.args or k in accepted.kwonlyargs}
        host_args, host_keywords = executor._init_args_hst(device_args, keywords)
        patched = interpreter._patch_lang(executor.fn)
        errors = []
        try:
            args = inspect.getcallargs(executor.fn, *host_args, **host_keywords)
            args = {k: v if k in executor.constexprs else interpreter._implicit_cvt(v) for k, v in args.items()}
            grid = executor.grid(args) if callable(executor.grid) else executor.grid
            grid = (*grid, *(1,) * (3 - len(grid)))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            programs = list(itertools.product(*map(range, grid)))
            order.shuffle(programs)
            remaining, lock = iter(programs), threading.Lock()

            def work():
                while not abandoned.is_set():
                    with lock:
                        program = next(remaining, None)
                    if program is None:
                        return
                    try:
                        current.program = program
                        executor.fn(**args)
                    except Exception as error:
                        errors.append(error)
                        return

            threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(JOIN_SECONDS)
            if any(thread.is_alive() for thread in threads):
                abandoned.set()
                raise Deadlock(f"programs still run after {JOIN_SECONDS} seconds")
            if errors:
                raise errors[0]
        finally:
            patched.restore()
        executor._restore_args_dev(device_args, host_args, keywords, host_keywords)

    call, memory = interpreter.GridExecutor.__call__, interpreter._interpreter
    interval = sys.getswitchinterval()
    interpreter.interpreter_builder.__dict__.pop("grid_idx", None)
    builder.grid_idx = property(lambda _: current.program, lambda _, value: setattr(current, "program", value))
    interpreter.GridExecutor.__call__ = launch
    interpreter._interpreter = _DelayedStores(memory, order)
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        interpreter._interpreter = memory
        sys.setswitchinterval(interval)
        interpreter.GridExecutor.__call__ = call
        del builder.grid_idx
