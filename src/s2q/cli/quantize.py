"""`s2q plan`, `s2q quantize` and `s2q inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from s2q.cli import options
from s2q.common.errors import InvalidInputError, UsageError
from s2q.common.interrupts import resumable
from s2q.common.outputs import lock_folder


def plan(
    model: options.Model,
    recipe: options.RecipeName = "s2q-w4a6",
    overrides: options.Overrides = None,
    dtype: options.DtypeOption = None,
    variant: options.Variant = None,
    device: options.Device = "auto",
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", help="Plan for a device with this much memory, e.g. 24GB.", metavar="SIZE"),
    ] = None,
    memory_budget: options.MemoryBudget = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a slice of the work on this device to estimate the time.")
    ] = False,
    prompts: options.Prompts = None,
    as_json: options.AsJson = False,
) -> None:
    """Show layers, bits, storage and memory before any compute."""
    from s2q.cli import console, output
    from s2q.models.synthetic import SYNTHETIC_PREFIX
    from s2q.planning import plan as make_plan

    console.quiet_libraries()
    if device_memory is None:
        device = options.resolve_device(device)
    else:  # of a machine that need not be here, a GPU unless the CPU is named
        options.check_device_name(device)
        device = "cuda" if device == "auto" else device
    memory = options.read_size("--device-memory", device_memory)
    budget = options.read_size("--memory-budget", memory_budget)
    if measure and (memory is not None or model.startswith(SYNTHETIC_PREFIX)):
        raise UsageError(
            "plan: --measure needs this device and the model's weights; omit --device-memory, and time "
            "synthetic models with s2q bench --ops calibration_block"
        )
    planned = make_plan(
        model,
        recipe=recipe,
        overrides=overrides or (),
        device=device,
        device_memory=memory,
        memory_budget=budget,
        dtype=dtype,
        variant=variant,
    )
    if measure:
        from s2q.models import resolve_model
        from s2q.planning import check_memory, this_machine
        from s2q.recipes.load import load_recipe
        from s2q.run.time_estimate import measured

        check_memory(planned)
        with console.progress() as report:
            planned = measured(
                planned,
                resolve_model(model, variant=variant),
                load_recipe(recipe, overrides=overrides or ()),
                machine=this_machine(device, memory_budget=budget),
                prompts=options.read_prompt_file(prompts),
                dtype=dtype,
                progress=report,
            )
    result = planned.to_dict()
    output.emit_json(result) if as_json else output.show_plan(result)


def quantize(
    model: options.Model,
    recipe: options.RecipeName,
    out: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.", metavar="OUT")],
    prompts: options.Prompts = None,
    samples: options.Samples = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    variant: options.Variant = None,
    memory_budget: options.MemoryBudget = None,
    workers: options.Workers = "auto",
    devices: options.Devices = None,
    engine: options.EngineName = "processes",
    ray_address: options.RayAddress = None,
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
    with resumable(lock_folder(out)), console.progress() as report:
        result = run(
            model,
            recipe=recipe,
            out=out,
            prompts=options.read_prompt_file(prompts),
            samples=samples,
            overrides=overrides or (),
            seed=seed,
            device=options.resolve_device(device),
            dtype=dtype,
            variant=variant,
            memory_budget=options.read_size("--memory-budget", memory_budget),
            workers=workers,
            devices=devices or None,
            engine=engine,
            ray_address=ray_address,
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


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id (@revision).", metavar="MODEL")],
    variant: options.Variant = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the SHA-256 of every file against the manifest.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show the contents of a checkpoint."""
    from s2q.cli import output
    from s2q.generation.load import inspect_model

    result = inspect_model(model, variant=variant, verify=verify)
    output.emit_json(result.to_dict()) if as_json else output.show_inspection(result.to_dict())
    if result.problems:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise InvalidInputError(f"{model} differs from its manifest: {result.problems[0]}{more}")
