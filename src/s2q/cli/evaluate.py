"""`s2q eval`: a model against full precision, with VBench beside if it is asked for."""

from pathlib import Path
from typing import Annotated, Any

import typer

from s2q.cli import options
from s2q.common.files import atomic_write_json
from s2q.common.outputs import check_file_output, output_lock
from s2q.common.progress import Progress

Reference = Annotated[str, typer.Option("--reference", help="The full-precision model.", metavar="MODEL")]
EvalFile = Annotated[Path, options.file_option("-o", "--output", help="JSON file to write.")]
VBenchPython = Annotated[
    str | None,
    typer.Option(
        "--vbench-python",
        help="Add VBench scores, computed by this Python interpreter with VBench installed.",
        metavar="PYTHON",
    ),
]
VBenchDims = Annotated[
    list[str] | None,
    options.names_option("--vbench-dims", help="Comma-separated VBench dimensions. Default: the paper's eight."),
]
VBenchCache = Annotated[
    Path | None, options.folder_option("--vbench-cache", help="VBench's weight cache. Default: VBench's default.")
]
Page = Annotated[
    Path | None,
    options.file_option(
        "--page", help="Also write an HTML report: videos side by side, metrics, what the run recorded."
    ),
]


@options.takes_generation
def evaluate(
    model: options.Model,
    reference: Reference,
    out: EvalFile = Path("eval.json"),
    prompts: options.Prompts = None,
    num_prompts: options.NumPrompts = 64,
    seeds: options.Seeds = 2,
    metrics: options.Metrics = None,
    lpips_weights: options.LpipsWeights = None,
    clip: options.ClipFolder = None,
    sensitivity: options.Sensitivity = None,
    page: Page = None,
    vbench_python: VBenchPython = None,
    vbench_dims: VBenchDims = None,
    vbench_cache: VBenchCache = None,
    generation: options.Generation = options.NO_GENERATION,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    variant: options.Variant = None,
    loras: options.Loras = None,
    verify: options.Verify = None,
    workers: options.Workers = "auto",
    devices: options.Devices = None,
    engine: options.EngineName = "processes",
    ray_address: options.RayAddress = None,
    offload: options.OffloadName = "auto",
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Evaluate a model against full precision."""
    check_file_output(out, overwrite=overwrite)
    device = options.resolve_device(device)
    from s2q.cli import console, judges, next_steps, output, pages
    from s2q.evaluation import evaluate as evaluation
    from s2q.evaluation.video_metrics import selected_metrics
    from s2q.generation.defaults import frame_rate_of, quantization_scheme

    console.quiet_libraries()
    selected_metrics(metrics or (), lpips=lpips_weights is not None, clip=clip is not None)  # refuses unknown ones
    ours, theirs = _sides(model, reference, variant)
    shown = pages.EvaluationPage.prepare(page, ours.folder, overwrite=overwrite)
    texts = options.read_prompt_file(prompts) or evaluation.default_prompts(theirs, count=num_prompts)
    vbench = {"python": vbench_python, "dimensions": vbench_dims or (), "cache": vbench_cache}
    frames = {"num_frames": generation.get("num_frames"), "frame_rate": frame_rate_of(theirs)}
    planned = judges.vbench_plan(out, texts, seeds=seeds, device=device, overwrite=overwrite, **frames, **vbench)
    with console.progress() as report, output_lock(out):
        result = evaluation.evaluate(
            ours,
            reference=theirs,
            prompts=texts,
            seeds=range(seeds),
            metrics=metrics or (),
            lpips_weights=lpips_weights,
            clip=clip,
            sensitivity=sensitivity or 0,
            **generation,
            device=device,
            dtype=dtype,
            loras=loras or (),
            verify=verify,
            workers=workers,
            devices=devices or None,
            engine=engine,
            ray_address=ray_address,
            offload=offload,
            video_done=pages.all_of(judges.keep_for(planned), shown and shown.keep),
            progress=report,
        )
        result = _written(out, result, planned, report)
        if shown is not None:
            shown.write(result)
    output.emit_json(result) if as_json else output.show_evaluation(result, scheme=quantization_scheme(ours))
    console.say(f"written to {out if page is None else f'{out} and {page}'}")
    if not as_json:
        given = {"prompts": prompts, "variant": variant, "loras": loras or ()}
        next_steps.say_next(next_steps.after_evaluate(model, reference, out, **given))


def _written(out: Path, result: dict[str, Any], planned: Any, progress: Progress) -> dict[str, Any]:
    """Write a result, and again with VBench's scores where they were asked for; return what was written last."""
    from s2q.cli import judges

    atomic_write_json(out, result)
    if planned is not None:
        result = judges.with_vbench(planned, result, progress=progress)
        atomic_write_json(out, result)
    return result


def _sides(model: str, reference: str, variant: str | None) -> tuple[Any, Any]:
    """Resolve the judged model and its reference, which must be full precision."""
    from s2q.models.source import check_full_precision, resolve_model

    ours, theirs = resolve_model(model, variant=variant, needs_variant=False), resolve_model(reference, variant=variant)
    check_full_precision(theirs)
    return ours, theirs
