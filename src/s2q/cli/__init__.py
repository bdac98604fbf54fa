"""The command line: `s2q demo | plan | quantize | generate | eval | compare | bench | inspect | export | …`.

`main` maps everything that can happen to an exit code: 0 done, 1 failure, 2 usage, 3 invalid input, 4 resources, 5
busy, 130 interrupted, 143 terminated. Results go to stdout, everything else to stderr. Nothing heavy is imported before
a command needs it.
"""

import os
import signal
import sys
import threading
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from s2q.common.errors import ResourceError, S2QError, first_line, is_out_of_memory
from s2q.common.files import failed_write, write_error
from s2q.common.interrupts import ARRIVED, ENDINGS

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how the threads of a CPU wait for each other."""

SPINS = "20000"
"""Spins of a waiting thread before it sleeps."""

LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Environment variable that puts PyTorch's large tensors on a CPU on pages of 2 MiB."""

EXIT_INTERRUPTED = 130


class _Stopped(BaseException):
    """SIGINT or SIGTERM arrived; unwinds so that temporary files are removed."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
        self.exit_code = 128 + number


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    limit_spinning(os.environ)
    take_large_pages(os.environ)
    code = run(sys.argv[1:] if argv is None else argv)
    if "ray" in sys.modules:
        from s2q.engines.ray_cluster import leave

        leave(code)
    sys.exit(code)


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let threads of PyTorch that wait for each other sleep after some microseconds, unless the user has chosen.

    By default they spin, and on a machine with other work the thread that all wait for does not get the processor.
    Asleep at once, threads of small operations wake up too late (docs/speed.md). To be called before torch is imported.
    """
    if not any(name in environment for name in WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS


def take_large_pages(environment: MutableMapping[str, str]) -> None:
    """Let PyTorch ask Linux for pages of 2 MiB for large tensors, unless the user has chosen.

    The result of a layer gets fresh memory, and touching its pages of 4 KiB for the first time takes up to a tenth of
    the layer's time (docs/speed.md). To be called before torch is imported.
    """
    environment.setdefault(LARGE_PAGES, "1")


def run(arguments: Sequence[str]) -> int:
    """Run the command line; `--debug` may stand anywhere in it."""
    debug = "--debug" in arguments
    ARRIVED.clear()
    previous = _catch_signals()
    try:
        from s2q.cli import console

        console.configure_logging(debug=debug)
        return _invoke([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt as interrupt:
        return _fail(interrupt, "interrupted", EXIT_INTERRUPTED, debug=debug)
    except _Stopped as stopped:
        return _fail(stopped, str(stopped), stopped.exit_code, debug=debug)
    except BrokenPipeError:  # the reader of stdout has gone; nothing more may be written there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if ARRIVED:  # a library made it this error
            stopped = _Stopped(ARRIVED[-1])
            return _fail(error, str(stopped), stopped.exit_code, debug=debug)
        if is_out_of_memory(error) and not isinstance(error, ResourceError):
            message = f"out of memory ({first_line(error)}); free some, or use a smaller model or smaller videos"
            return _fail(error, message, ResourceError.exit_code, debug=debug)
        write = failed_write(error)
        if write is not None:
            error = write_error(write, Path(write.filename or "standard output"))
        if isinstance(error, S2QError):
            return _fail(error, str(error), error.exit_code, debug=debug)
        hint = "" if debug else "; this is a defect of s2q, --debug shows where"
        return _fail(error, f"{type(error).__name__}: {error}{hint}", 1, debug=debug)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _invoke(arguments: list[str]) -> int:
    import typer

    from s2q.cli import console
    from s2q.cli.app import app

    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # click's, or that of typer's own copy of it
    try:
        result = typer.main.get_command(app).main(args=arguments or ["--help"], prog_name="s2q", standalone_mode=False)
    except typer.Exit as leave:
        result = leave.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "s2q"
        console.say_error(f"{error.format_message()} (see {where} --help)")  # type: ignore[attr-defined]
        return 2
    if result == EXIT_INTERRUPTED:  # typer's answer to Ctrl-C
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _fail(error: BaseException, message: str, code: int, *, debug: bool) -> int:
    from s2q.cli import console

    console.say_error(" ".join("; ".join([message, *getattr(error, "__notes__", ())]).split()))
    if debug:
        import traceback

        console.stderr.print("".join(traceback.format_exception(error)), markup=False, highlight=False)
    return code


def _catch_signals() -> dict[int, Any]:
    """Let SIGINT and SIGTERM unwind the stack; return the handlers replaced, none where signals are somebody else's."""

    def stop(number: int, _frame: FrameType | None) -> None:
        ARRIVED.append(number)
        raise _Stopped(number)

    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, stop) for number in ENDINGS if signal.getsignal(number) == defaults[number]}
