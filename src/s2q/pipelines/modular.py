"""The interface of a pipeline of diffusers around the steps of a modular one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers import ModularPipeline as DiffusersModular
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks, PipelineState

from s2q.common.errors import UsageError
from s2q.common.files import atomic_write_json
from s2q.pipelines.index import MODULAR_INDEX, modular_index
from s2q.pipelines.load import loading_class

StepDone = Callable[[Any, int, Any, dict[str, Any]], Any]


class ModularPipeline(DiffusionPipeline):
    """A pipeline whose call runs the steps of a modular one.

    It is saved as that: `diffusers.ModularPipeline.from_pretrained(folder)` reads it.

    Attributes:
        other_options: Of the index, for other workflows of the model; saved with it.
    """

    _callback_tensor_inputs = ["latents"]
    config_name = MODULAR_INDEX
    other_options: Mapping[str, Any] = MappingProxyType({})

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save the components and modular_model_index.json; options are those of `DiffusionPipeline`."""
        if options.pop("push_to_hub", False):
            raise UsageError(f"{type(self).__name__}: push_to_hub is not possible; save it, and use s2q push")
        super().save_pretrained(save_directory, **options)
        entries = {name: value for name, value in self.config.items() if isinstance(value, tuple) and all(value)}
        other = {name: value for name, value in self.config.items() if not isinstance(value, tuple)}
        content = modular_index(loading_class(type(self).__name__), entries, {**self.other_options, **_saved(other)})
        atomic_write_json(Path(save_directory) / MODULAR_INDEX, content)

    @classmethod
    def from_pretrained(cls, *_args: Any, **_options: Any) -> Any:
        """Refuse: `s2q.load` and diffusers' own class load what was saved."""
        own = loading_class(cls.__name__)
        raise UsageError(f"{cls.__name__}: has no from_pretrained; use s2q.load(FOLDER), or {own} of diffusers")

    def run(
        self,
        steps: ModularPipelineBlocks,
        *,
        helpers: Mapping[str, Any],
        step_done: StepDone | None,
        skipped: Collection[str] = (),
        **inputs: Any,
    ) -> PipelineState:
        """Run the steps of a workflow around the components of this pipeline.

        The loop of denoising ends early where `_interrupt` is set, as that of other pipelines.

        Args:
            steps: A workflow of the model, each step once.
            helpers: Components of the workflow that this pipeline has not.
            step_done: Called after each denoising step with this pipeline, the step's index, its timestep and the
                latents as the transformer has them.
            skipped: Names of steps that do not run.
            inputs: Of the workflow; the others have their defaults.

        Returns:
            All that the steps made, by name.
        """
        model = _modular_class(self)(blocks=steps)
        parts = {name: part for name, part in self.components.items() if part is not None}
        model.update_components(**parts, **helpers)
        state, self._interrupt = PipelineState(), False
        for known in steps.inputs:
            if known.name is not None:
                state.set(known.name, inputs.get(known.name, known.default), known.kwargs_type)
        try:
            with torch.no_grad():
                for name, step in steps.sub_blocks.items():
                    if isinstance(step, LoopSequentialPipelineBlocks):
                        self._run_loop(model, step, state, step_done)
                    elif name not in skipped:
                        step(model, state)
        finally:
            self.maybe_free_model_hooks()
        return state

    def _run_loop(
        self,
        model: DiffusersModular,
        loop: LoopSequentialPipelineBlocks,
        state: PipelineState,
        step_done: StepDone | None,
    ) -> None:
        of_loop = loop.get_block_state(state)
        with self.progress_bar(total=len(of_loop.timesteps)) as bar:
            for index, timestep in enumerate(of_loop.timesteps):
                if self._interrupt:
                    break
                loop.loop_step(model, of_loop, i=index, t=timestep)
                if step_done is not None:
                    step_done(self, index, timestep, {"latents": of_loop.latents[None].clone()})
                bar.update()
        loop.set_block_state(state, of_loop)


def _modular_class(pipe: ModularPipeline) -> type[DiffusersModular]:
    import diffusers

    found: type[DiffusersModular] = getattr(diffusers, loading_class(type(pipe).__name__))
    return found


def _saved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without what diffusers notes of a loaded pipeline."""
    return {name: value for name, value in options.items() if not name.startswith("_") or name == "_diffusers_version"}
