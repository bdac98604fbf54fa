"""Pipelines of models that diffusers has as modular pipelines only, and the index of a pipeline's folder.

A pipeline of diffusers is built, loaded and saved as one object. A modular one is a list of steps around components,
described by modular_model_index.json. For each of these that s2q runs there is a class here with the interface of the
others, which runs the model's own steps; the rest of s2q sees one kind of pipeline.
"""

from s2q.pipelines.index import (
    INDEX,
    INDEXES,
    MODULAR_INDEX,
    copy_files,
    find_index,
    modular_components,
    pinned_index,
    read_index,
)
from s2q.pipelines.load import load_pipeline, loading_class, pipeline_type

__all__ = [
    "INDEX",
    "INDEXES",
    "MODULAR_INDEX",
    "copy_files",
    "find_index",
    "load_pipeline",
    "loading_class",
    "modular_components",
    "pinned_index",
    "pipeline_type",
    "read_index",
]
