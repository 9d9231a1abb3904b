"""The command line: which command, and what becomes of its failures."""

import contextlib
import difflib
import errno
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, TextIO

from fewstep._version import __version__
from fewstep.cli.usage import train_usage
from fewstep.utils.errors import ConfigError, FewstepError, FewstepWarning, WriteError
from fewstep.utils.text import printable

_LONGEST = 2000  # characters of a message: it may quote what a file holds
COMMANDS = {
    "quickstart": ("", "train on real digits, measure, write a report: minutes on a laptop"),
    "advise": ("DATA", "which recipe for some data, perhaps a teacher, perhaps little time; what to expect"),
    "recipes": ("", "what can be trained, the figure to expect, the cost"),
    "objectives": ("", "every training objective: formula, velocity, gradient, evaluations, paper"),
    "train": ("RECIPE", "train it, or go on where it stopped; every option can be set by name"),
    "sample": ("RUN", "draw images from a trained run"),
    "tune-steps": ("RUN", "place its 2 and 4 steps better, by search on held-out data; sample uses them then"),
    "evaluate": ("RUN", "measure its samples against held-out data"),
    "report": ("RUN", "write RUN/report.html, one self-contained page"),
    "encode": ("FOLDER", "turn a folder of images into latents to train on, with an autoencoder of yours"),
    "merge": ("RUN", "make a model with adapters (--lora) a whole one, without its teacher"),
    "export": ("RUN", "write it for programs without fewstep: diffusers, onnx, torch"),
    "statistics": ("RUN", "what an analytic preconditioning computes from a teacher: estimated, drawn, its cost"),
    "policy-quickstart": ("", "the same for a robot: a maze with two ways, its policy, its page"),
    "demos": ("TASK", "record demonstrations of a robot's task, to train a policy on"),
    "rollout": ("RUN", "let a policy act: success, episode length, time per decision"),
    "compare": ("RUN RUN ...", "how many images each method needs to the same quality, with their curves"),
}
"""What each command takes, and does: fewstep.cli.COMMAND has its `Options` and its `run`."""

OVERVIEW = f"""fewstep {__version__}: generative models that need one to four network calls.

{"".join(f"  {f'fewstep {name} {takes}':<29}{does}" + chr(10) for name, (takes, does) in COMMANDS.items())}
A RUN is the folder that `train` wrote, or a saved model. Add --help to a command for its options,
for example: fewstep train digits --help. Parts of your own: --import FILE.py with any command.
"""


def _line(message: object) -> str:
    """What went wrong in one line, not without end, with nothing in it that a terminal would obey."""
    text = " ".join(str(message).split())
    return printable(f"fewstep: {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}")


class _Printed:
    """Standard output to which nothing is written that a terminal would obey, whatever files and folders are called."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, fewstep's own warnings are one line each, without the place in the code that gave them."""
    usual = warnings.formatwarning

    def plain(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, FewstepWarning):
            return _line(message) + "\n"
        return printable(usual(message, category, filename, lineno, line))

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Inside, whatever an interrupt becomes on its way, as in the middle of an import, ends as a KeyboardInterrupt."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if seen:
            raise KeyboardInterrupt from error
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_shortage(error: Exception) -> bool:
    """Whether memory ran out. PyTorch is not imported for it, which would slow every --help."""
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _device(options: object) -> contextlib.AbstractContextManager[None]:
    """Where the command's work happens. PyTorch is imported for those alone that may choose."""
    places = (options, getattr(options, "runtime", None))
    if not any(getattr(place, "cpu", False) for place in places):
        return contextlib.nullcontext()
    from fewstep.utils.device import placed

    return placed(cpu=True)


def run_command(name: str, args: Sequence[str]) -> None:
    """Run one of COMMANDS. Its module is imported here, and PyTorch with it: overviews are shown without."""
    if name == "train" and list(args[:1]) in (["-h"], ["--help"]):
        print(train_usage())
        return
    from fewstep.cli.kinds import import_named
    from fewstep.cli.parsing import parse

    words = import_named(args)
    command = importlib.import_module(f"fewstep.cli.{name.replace('-', '_')}")
    options = command.read(words) if hasattr(command, "read") else parse(command.Options, words, name)
    try:
        with contextlib.redirect_stdout(_Printed(sys.stdout)), _device(options):
            command.run(options)
    except WriteError as error:
        elsewhere = "; or give another place with --out" if hasattr(options, "out") else ""
        raise WriteError(f"{error}{elsewhere}") from error


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line on standard error for bad input."""
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; commands: {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {arguments[0]!r}{hint}")
        with _plain_warnings(), _interrupts():
            run_command(arguments[0], arguments[1:])
        sys.stdout.flush()
    except FewstepError as error:
        print(_line(error), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        reason = str(error).strip().splitlines() or ["no more to be had"]
        advice = "take a smaller network, smaller batches or fewer samples, or --runtime.micro-batch to train"
        print(_line(f"out of memory ({reason[0]}): {advice}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        usual = "interrupted; the same command goes on from what was saved, or begins anew"
        print(_line(interrupt if str(interrupt) else usual), file=sys.stderr)
        return getattr(interrupt, "code", 130)
    except BrokenPipeError:
        # The reader has gone, as `head` does. Whatever is still buffered goes nowhere, or exit would report it anew.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(_line(f"{str(error.filename)[:100]}...: {error.strerror}: give a shorter one"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
