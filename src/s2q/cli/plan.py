"""`s2q plan`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2q.cli import options
from s2q.common.errors import UsageError

if TYPE_CHECKING:
    from s2q.planning import Plan


def plan(
    model: options.Model,
    recipe: options.RecipeName = "s2q-w4a6",
    recipes: Annotated[
        list[str] | None,
        options.names_option(
            "--recipes", help="Compare these recipes by size, time and measured error; all: every one."
        ),
    ] = None,
    overrides: options.Overrides = None,
    dtype: options.DtypeOption = None,
    variant: options.Variant = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:N; or h100, 4090, ... for an estimate.", metavar="D")
    ] = "auto",
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
    """Show layers, bits, storage, memory and estimated time before any compute."""
    from s2q.cli import console, output
    from s2q.models.synthetic import SYNTHETIC_PREFIX
    from s2q.planning import gpus
    from s2q.planning import plan as make_plan

    console.quiet_libraries()
    named = device.lower() in gpus()
    if not named and device_memory is None:
        device = options.resolve_device(device, others=tuple(gpus()))
    elif not named:  # of a machine that need not be here, a GPU unless the CPU is named
        options.check_device_name(device, others=tuple(gpus()))
        device = "cuda" if device == "auto" else device
    memory = options.read_size("--device-memory", device_memory)
    budget = options.read_size("--memory-budget", memory_budget)
    if measure and recipes:
        raise UsageError("plan: --measure measures one recipe; omit --recipes")
    if measure and (named or memory is not None or model.startswith(SYNTHETIC_PREFIX)):
        raise UsageError(
            "plan: --measure needs this device and the model's weights; omit --device-memory and the name of a GPU, "
            "and time synthetic models with s2q bench --ops calibration_block"
        )
    arguments: dict[str, Any] = {
        "overrides": overrides or (),
        "device": device,
        "device_memory": memory,
        "memory_budget": budget,
        "dtype": dtype,
        "variant": variant,
    }
    if recipes:
        comparison = _compare(model, recipes, arguments)
        output.emit_json(comparison) if as_json else output.show_recipes(comparison)
        return
    planned = make_plan(model, recipe=recipe, **arguments)
    if measure:
        planned = _measured(planned, model, recipe, arguments, prompts=options.read_prompt_file(prompts))
    result = planned.to_dict()
    output.emit_json(result) if as_json else output.show_plan(result)


def _measured(
    planned: "Plan", model: str, recipe: str, arguments: Mapping[str, Any], *, prompts: Sequence[str] | None
) -> "Plan":
    """A plan with the times of a slice of the run."""
    from s2q.cli import console
    from s2q.models import resolve_model
    from s2q.planning import check_memory, this_machine
    from s2q.recipes.load import load_recipe
    from s2q.run.time_estimate import measured

    check_memory(planned)
    with console.progress() as report:
        return measured(
            planned,
            resolve_model(model, variant=arguments["variant"]),
            load_recipe(recipe, overrides=arguments["overrides"]),
            machine=this_machine(arguments["device"], memory_budget=arguments["memory_budget"]),
            prompts=prompts,
            dtype=arguments["dtype"],
            progress=report,
        )


def _compare(model: str, recipes: Sequence[str], arguments: Mapping[str, Any]) -> dict[str, Any]:
    from s2q.common.records import PLAN_VERSION
    from s2q.planning import compare_recipes
    from s2q.recipes import recipe_names

    names = recipe_names() if "all" in recipes else recipes
    return {"schema_version": PLAN_VERSION, "recipes": compare_recipes(model, names, **arguments)}
