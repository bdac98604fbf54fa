"""`s2q quantize` and `s2q inspect`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from s2q.cli import options
from s2q.common.errors import InvalidInputError
from s2q.common.interrupts import resumable
from s2q.common.outputs import lock_folder


@options.takes_generation
def quantize(
    model: options.Model,
    recipe: options.RecipeName,
    out: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.", metavar="OUT")],
    prompts: options.Prompts = None,
    samples: options.Samples = None,
    generation: options.Generation = options.NO_GENERATION,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    variant: options.Variant = None,
    loras: options.Loras = None,
    memory_budget: options.MemoryBudget = None,
    workers: options.Workers = "auto",
    devices: options.Devices = None,
    engine: options.EngineName = "processes",
    ray_address: options.RayAddress = None,
    offload: options.OffloadName = "auto",
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    overrides: options.Overrides = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """Quantize a model into a checkpoint that diffusers loads."""
    from s2q.cli import console, output
    from s2q.run.quantize import quantize as run

    console.quiet_libraries()
    changes = options.with_generation(overrides, generation)
    with resumable(lock_folder(out)), console.progress() as report:
        result = run(
            model,
            recipe=recipe,
            out=out,
            prompts=options.read_prompt_file(prompts),
            samples=samples,
            overrides=changes,
            seed=seed,
            device=options.resolve_device(device),
            dtype=dtype,
            variant=variant,
            loras=loras or (),
            memory_budget=options.read_size("--memory-budget", memory_budget),
            workers=workers,
            devices=devices or None,
            engine=engine,
            ray_address=ray_address,
            offload=offload,
            resume=resume,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=report,
        ).to_dict()
    if as_json:
        output.emit_json(result)
    elif dry_run:
        output.show_plan(result)
    else:
        console.say(f"{out}: {len(result['layers'])} linears, {result['storage']['ratio']:.2f} times smaller")
        _say_next(model, recipe, out, overrides=overrides, variant=variant, loras=loras or (), device=result["device"])


def _say_next(
    model: str,
    recipe: str,
    out: Path,
    *,
    overrides: Sequence[str] | None,
    variant: str | None,
    loras: Sequence[str],
    device: str,
) -> None:
    """Show the commands that use the checkpoint, and a recipe with less error that costs the same."""
    from s2q.cli import console, next_steps, output
    from s2q.planning import device_products, planned_widths
    from s2q.recipes.load import load_recipe

    evaluate = next_steps.evaluate_with(out, model, variant=variant, loras=loras)
    next_steps.say_next([next_steps.generate_with(out, variant=variant), evaluate])
    validated, products = load_recipe(recipe, overrides=overrides or ()), device_products(device)
    if products is not None and (same := planned_widths(validated, products).same_cost) is not None:
        console.say(output.same_cost_line(same, recipe))


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id (@revision).", metavar="MODEL")],
    variant: options.Variant = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the SHA-256 of every file against the manifest.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the contents of a checkpoint."""
    from s2q.cli import next_steps, output
    from s2q.generation.load import inspect_model

    result = inspect_model(model, variant=variant, verify=verify)
    output.emit_json(result.to_dict()) if as_json else output.show_inspection(result.to_dict())
    if not (as_json or result.problems):
        next_steps.say_next([next_steps.generate_with(model, variant=variant)])
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise InvalidInputError(f"{model} differs from its manifest: {result.problems[0]}{more}")
