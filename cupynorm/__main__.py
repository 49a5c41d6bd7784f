"""The command line: `python -m cupynorm train`, `compile` and `info`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import __version__, devices
from ._types import ACTIVATIONS, DTYPES


def _whole(minimum: int) -> Callable[[str], int]:
    """Return an argument type: whole numbers from minimum to 2**32 - 1, scikit-learn's limit for seeds."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} to 2**32 - 1, got {text!r}")
        return int(text)

    return parse


def _words(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return an argument type: known words, separated by commas."""

    def parse(text: str) -> list[str]:
        for word in (words := text.split(",")):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return words

    return parse


def _bar(done: int, total: int, what: str) -> None:
    """Show how far the compilation is, in one line of a terminal; elsewhere only the end."""
    terminal = sys.stderr.isatty()
    if terminal or done == total:
        filled = "#" * (30 * done // max(total, 1))
        line = f"[{filled:<30}] {done} of {total} modules: {what}"
        print(f"\r{line:<79}" if terminal else line, end="" if done < total else "\n", file=sys.stderr, flush=True)


def _compile(dtypes: Sequence[str], activations: Sequence[str]) -> None:
    """Compile the loops of the usual kinds of calls.

    Raises:
        ImportError: llvmlite is missing, or ml_dtypes for bfloat16. OSError: the code cannot be kept.
    """
    from . import cpu, warm

    if cpu.llvmlite is None:
        raise ImportError(f"there are no compiled loops ({cpu.without_llvmlite}); they need cupynorm[cpu]")
    from .cpu import llvm_machine

    if why := llvm_machine.not_kept():
        raise OSError(f"the loops cannot be kept: {why}. CUPYNORM_CACHE_DIR sets another folder")
    steps = warm.usual_steps(dtypes, [None if name == "none" else name for name in activations])
    for done, (what, step) in enumerate(steps):
        _bar(done, len(steps), what)
        step()
    _bar(len(steps), len(steps), "done")
    if why := llvm_machine.not_kept():  # a full disk
        raise OSError(f"not all loops could be kept: {why}")
    print(f"The loops for {llvm_machine.processor()} are in {llvm_machine.folder()}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cupynorm", description="Instance normalisation for CuPy and NumPy arrays."
    )
    parser.add_argument("--version", action="version", version=f"cupynorm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train on real handwritten digits, with and without InstanceNorm2d, and compare",
        description="Train a small convolutional network on the 1797 handwritten digits of scikit-learn, with "
        "InstanceNorm2d and without normalisation, and test both on images with another brightness and contrast. "
        "Prints a table and draws a picture. Needs pip install 'cupynorm[demo]'.",
    )
    train.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if one is usable, else the CPU")
    train.add_argument(
        "--epochs", type=_whole(1), default=20, help="passes over the training images, default %(default)s"
    )
    train.add_argument(
        "--seed", type=_whole(0), default=0, help="seed of the split, initial weights and order, default %(default)s"
    )
    train.add_argument(
        "--out", default=".", metavar="PATH", help="path of the picture: a folder or a .png file, default: this folder"
    )
    compile_ = commands.add_parser(
        "compile",
        help="compile the CPU's loops for the usual kinds of calls, so that no first call has to",
        description="Compile the CPU's loops for the usual kinds of calls, and keep them on disk, for images of "
        "containers and for jobs of many processes: forward and backward, channels-first, and channels-last with 3 "
        "channels or 32, in training and with running statistics. CUPYNORM_CACHE_DIR says where they are kept. The "
        "code is for this kind of processor. Needs pip install 'cupynorm[cpu]'.",
    )
    compile_.add_argument(
        "--dtype", type=_words(DTYPES), default=["float32"], help=f"some of {','.join(DTYPES)}; default float32"
    )
    names = ("none", *ACTIVATIONS)
    compile_.add_argument(
        "--activation", type=_words(names), default=[*names], help=f"some of {','.join(names)}; default: all"
    )
    commands.add_parser(
        "info",
        help="print versions, devices, backends and missing packages for a bug report",
        description="Print versions, devices, usable backends, the caches of compiled code, the relevant environment "
        "variables, and missing packages with the commands that install them, as text for a bug report.",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
    elif options.command == "info":
        from . import info

        print(info.report())
    elif options.command == "compile":
        try:
            _compile(options.dtype, options.activation)
        except (ImportError, OSError) as error:
            parser.exit(2, f"{parser.prog} compile: error: {error}\n")
    else:
        from . import demo

        try:
            demo.check_extra()
            device = devices.resolve(options.device)
            demo.png_path(options.out)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            parser.exit(2, f"{parser.prog} train: error: {error}\n")
        demo.train(device, options.epochs, options.seed, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
