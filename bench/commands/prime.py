"""Compile kernels into CuPy's disk cache, one process a core: python -m bench prime.

Later processes load them from there. The modules that most calls need come first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

os.environ["CUPYNORM_EAGER"] = "0"  # before the import, also in the pool's processes, which compile only their tasks

from cupynorm import devices
from cupynorm.cuda.source import Module, all_modules


def load(module: Module) -> float:
    """Compile a module, or load it from the cache, and return the seconds it took."""
    from cupynorm.cuda.backend import runtime

    start = time.perf_counter()
    runtime.load(module)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench prime", description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=float, default=60, metavar="S", help="start no module after S seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one for each core")
    options = parser.parse_args(arguments)
    usable, why = devices.gpu_status()
    if not usable:
        parser.error(f"no usable GPU: {why}")
    from cupynorm.cuda.backend import runtime

    start = time.monotonic()
    clusters = runtime.device().cluster > 1
    modules = [m for m in all_modules() if clusters or not any(variant.scope == "cluster" for variant in m.variants)]
    spent, failures = 0.0, 0
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(load, module): module for module in modules}
        try:
            for task in as_completed(tasks, timeout=options.limit):
                try:
                    spent += task.result()
                except Exception as error:
                    failures += 1
                    print(f"FAILED: {tasks[task]}: {error}", flush=True)
        except TimeoutError:
            pool.shutdown(wait=True, cancel_futures=True)
    done = sum(task.done() and not task.cancelled() for task in tasks)
    taken = f"{time.monotonic() - start:.0f} s ({spent:.0f} s of work)"
    print(f"{done} of {len(modules)} modules in {taken}, {failures} failed")
    return 1 if failures else 0
