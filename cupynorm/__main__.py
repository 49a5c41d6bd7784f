"""The command line: `python -m cupynorm train` and `python -m cupynorm info`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from . import __version__, devices


def _whole(minimum: int) -> Callable[[str], int]:
    """Return an argument type: whole numbers from minimum to 2**32 - 1, scikit-learn's limit for seeds."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} to 2**32 - 1, got {text!r}")
        return int(text)

    return parse


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
