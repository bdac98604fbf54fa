"""One of the paper's tables for one model: quantize, judge, set our figures beside the paper's.

    python benchmarks/reproduce TABLE -m MODEL --prompts FILE --calibration-prompts FILE -o DIR [--dry-run]

TABLE is one of those in ``specs.TABLES``. Run again after an interruption: finished checkpoints and judged pieces are
kept, also between tables that share them. ``docs/real-models.md`` says what each needs.
"""

import argparse
import logging
import sys
from pathlib import Path

from reproduce.beside import write
from reproduce.plan import Request
from reproduce.run import carry_out, commands
from reproduce.specs import NO_RECIPE, TABLES, check_changes, chosen_rows
from s2q.cli import EXIT_INTERRUPTED
from s2q.cli.console import quiet_libraries
from s2q.cli.options import resolve_device
from s2q.common.errors import InvalidInputError, S2QError
from s2q.evaluation.evaluate import default_prompts
from s2q.generation.prompts import read_prompts
from s2q.shapes.embedded import EMBEDDED_NAMES

_EMBEDDED_PROMPTS = 64
_SETTINGS = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")


def arguments_of(argv: list[str]) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("-m", "--model", required=True, help="Hub id, diffusers folder or embedded name")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder of everything that is made")
    parser.add_argument("--prompts", type=Path, help="prompts that are judged, one a line; embedded models have some")
    parser.add_argument("--calibration-prompts", type=Path, help="prompts that are calibrated on, others than those")
    parser.add_argument("--num-prompts", type=int, help="judge only the first N prompts")
    parser.add_argument("--seeds", type=int, default=1, help="videos a prompt (the paper: 1)")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="change the recipes of all rows")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ROW", help="run only this variant; may be repeated"
    )
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int, dest="num_inference_steps")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="compute dtype of both sides; default: the stored one")
    parser.add_argument("--piece", type=int, default=4, help="prompts judged together; what an interruption loses")
    parser.add_argument("--dry-run", action="store_true", help="show the commands of what is missing, do nothing")
    return parser.parse_args(argv)


def request_of(arguments: argparse.Namespace) -> Request:
    """Return a checked request.

    Raises:
        InvalidInputError: If prompts are needed and not given.
    """
    embedded = arguments.model in EMBEDDED_NAMES
    needs_prompts = TABLES[arguments.table].kind == "quality"
    if needs_prompts and not embedded and not (arguments.prompts and arguments.calibration_prompts):
        raise InvalidInputError(
            f"{arguments.model}: pass --prompts FILE, to judge on, and --calibration-prompts FILE, about ten others"
        )
    prompts: list[str] = []
    if arguments.prompts:
        prompts = read_prompts(arguments.prompts)[: arguments.num_prompts]
    elif needs_prompts:
        prompts = default_prompts(arguments.model, count=arguments.num_prompts or _EMBEDDED_PROMPTS)
    calibration = read_prompts(arguments.calibration_prompts) if arguments.calibration_prompts else None
    return Request(
        model=arguments.model,
        out=arguments.output,
        prompts=prompts,
        prompts_file=arguments.prompts,
        calibration_prompts=calibration,
        calibration_file=arguments.calibration_prompts,
        seeds=arguments.seeds,
        settings={name: value for name in _SETTINGS if (value := getattr(arguments, name)) is not None},
        changes=arguments.set,
        device=resolve_device(arguments.device),
        dtype=arguments.dtype,
        piece=arguments.piece,
    )


def main(argv: list[str]) -> int:
    """Make a table, or say how it would be made; returns the exit code."""
    arguments = arguments_of(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("reproduce").setLevel(logging.INFO)
    try:
        table = TABLES[arguments.table]
        chosen = chosen_rows(table, arguments.only)
        check_changes(table, arguments.set)
        request = request_of(arguments)
        if arguments.dry_run:
            lacking = [row.method for row in chosen.rows if row.variant is not None and not row.runs]
            print(*commands(chosen, request), *(f"# {method}: {NO_RECIPE}" for method in lacking), sep="\n")
        else:
            quiet_libraries()
            carry_out(chosen, request)
            print(write(table, request), end="")
    except S2QError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command resumes it", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
