"""`s2q push`."""

from pathlib import Path
from typing import Annotated

import typer

from s2q.cli import options


def push(
    model: Annotated[str, typer.Argument(help="Checkpoint folder.", metavar="CHECKPOINT")],
    repo: Annotated[str, typer.Argument(help="Hub id to write: organisation/name[@branch].", metavar="REPO_ID")],
    evaluation: Annotated[
        Path | None, options.file_option("--eval", help="eval.json of the checkpoint, for the card.")
    ] = None,
    videos: Annotated[
        Path | None, options.folder_option("--videos", help="Folder of s2q generate of the checkpoint, for the card.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public, or accept a public one.")
    ] = False,
    message: Annotated[str | None, typer.Option("--message", help="Message of the commit.", metavar="TEXT")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that the branch has, and an edited model card.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the files, without writing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Push a checkpoint to the Hub, private by default."""
    from huggingface_hub.utils import disable_progress_bars

    from s2q.cli import console, next_steps, output
    from s2q.common.errors import counted
    from s2q.exports.push import push as run
    from s2q.models.hub import MAIN
    from s2q.report.formatting import format_bytes

    console.quiet_libraries()
    if not console.stderr.is_terminal:
        disable_progress_bars()
    with console.progress() as report:
        result = run(
            model,
            repo=repo,
            evaluation=evaluation,
            videos=videos,
            private=not public,
            message=message,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=report,
        ).to_dict()
    if as_json:
        output.emit_json(result)
        return
    visibility = "private" if result["private"] else "public"
    size = format_bytes(sum(result["files"].values()))
    what = "nothing was written" if result["commit"] is None else f"commit {result['commit'][:12]}"
    name = result["repo"] if result["branch"] == MAIN else f"{result['repo']}@{result['branch']}"
    console.say(f"{name} ({visibility}): {counted(len(result['files']), 'file')}, {size}, {what}")
    if result["commit"] is None:
        for file, size_bytes in result["files"].items():
            console.say(f"would be written: {file} ({format_bytes(size_bytes)})")
        for file in result["deleted"]:
            console.say(f"would be deleted: {file}")
        told = {"public": public, "message": message, "overwrite": overwrite}
        next_steps.say_next(next_steps.after_dry_push(model, repo, evaluation=evaluation, videos=videos, **told))
    else:
        next_steps.say_next([next_steps.generate_with(name, folder=Path(model))])
