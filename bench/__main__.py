"""Run a command of the benchmark: python -m bench [COMMAND] [OPTIONS]."""

from __future__ import annotations

import argparse
import importlib
import sys

#: What each module in `commands` does. A module is imported only if its command is chosen: some change the environment.
COMMANDS = {
    "speed": "time cupynorm beside its peers and a copy of the same bytes",
    "accuracy": "measure the errors of cupynorm and its peers on difficult data",
    "variants": "time each kernel variant that fits a plane, beside the planned one",
    "host": "measure the host time of a call on a small tensor",
    "instructions": "count the instructions that kernels issue, beside a budget; needs no GPU",
    "smoke": "run every kind of kernel once, and compare it with NumPy",
    "dram": "compare the bytes moved to and from a GPU's memory with those that a plan promises",
    "prime": "compile kernels into CuPy's disk cache",
    "dtypes": "time calls on inputs of another dtype than the result, beside a cast first",
    "masks": "time calls with a mask, beside those without",
    "zscore": "time zscore beside SciPy's",
    "parts": "time moments, gradient_sums and calls on parts of planes",
    "passes": "time NumPy's own loops beside calls without a compiler",
    "values": "time calls on the CPU by the size of values",
    "aims": "compare a result with the aims",
    "summary": "print the last lines of bench/gpu.sh",
}
DEFAULT = "speed"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        usage="python -m bench [COMMAND] [OPTIONS]",
        description=f"The benchmark. Without a command it runs {DEFAULT}. `python -m bench COMMAND --help` lists the "
        "options of a command.",
        epilog="\n".join(["commands:", *(f"  {name:12} {what}" for name, what in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if arguments[:1] in (["-h"], ["--help"]):
        parser.print_help()
        return 0
    if not arguments or arguments[0].startswith("-"):
        arguments = [DEFAULT, *arguments]
    command, *options = arguments
    if command not in COMMANDS:
        parser.error(f"no command {command!r}; the commands are {', '.join(COMMANDS)}")
    return int(importlib.import_module(f".commands.{command}", __package__).main(options))


if __name__ == "__main__":
    sys.exit(main())
