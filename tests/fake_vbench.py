"""A stand-in for the package `vbench`: the same entry points, scores that say which file they are of, faults on demand.

It shows the protocol only. FAKE_VBENCH names a fault; `videos.json` in the results folder says how it was called.
"""

from pathlib import Path

PACKAGE = """
import json
import math
import os
import sys

FAULT = os.environ.get("FAKE_VBENCH", "")
if FAULT == "import":
    import a_module_that_is_not_there
INFO = os.path.join(os.path.dirname(__file__), "VBench_full_info.json")


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert full_info_dir == INFO
        self.device, self.output_path = device, output_path

    def build_full_dimension_list(self):
        return ["subject_consistency", "overall_consistency", "scene", "dynamic_degree"]

    def check_dimension_requires_extra_info(self, dimension_list):
        assert "scene" not in dimension_list

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, mode="vbench_standard"):
        print("judging", flush=True)
        if FAULT == "fail":
            print("first\\\\nsecond")
            raise SystemExit("the weights are of another model")
        prompts = prompt_list or {file: file[: file.rindex("-")] for file in os.listdir(videos_path)}
        with open(INFO) as file:
            own = {one["prompt_en"]: one["dimension"] for one in json.load(file)}
        results = {}
        for dimension in dimension_list:
            files = [f for f in sorted(prompts) if mode == "custom_input" or dimension in own[prompts[f]]]
            paths = {file: os.path.join(videos_path, file) for file in files}
            sizes = {file: os.path.getsize(path) for file, path in paths.items()}
            videos = [{"video_path": paths[file], "video_results": 1 / sizes[file]} for file in files]
            if FAULT == "missing video":
                videos.pop()
            if FAULT == "nan video":
                videos[0]["video_results"] = math.nan
            score = sum(1 / size for size in sizes.values()) / len(sizes)
            results[dimension] = [math.nan if FAULT == "nan" else score, videos]
        if FAULT == "missing dimension":
            results.popitem()
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump(results, file)
        with open(os.path.join(self.output_path, "call.json"), "w") as file:
            cache = os.environ.get("VBENCH_CACHE_DIR")
            json.dump({"mode": mode, "local": local, "cache": cache, "device": str(self.device)}, file)
"""
UTILS = """
import os
import subprocess


def init_submodules(dimension_list, local=False, read_frame=False):
    for name in dimension_list:
        if os.environ.get("FAKE_VBENCH") == "weights":
            subprocess.run(["wget", "https://example.org/" + name + ".pth"], check=True)
    return {name: [] for name in dimension_list}
"""
INFO = """[
  {"prompt_en": "alley", "dimension": ["scene", "subject_consistency"]},
  {"prompt_en": "beach", "dimension": ["scene", "subject_consistency"]},
  {"prompt_en": "a dog, running", "dimension": ["overall_consistency"]}
]"""


def write_fake(folder: Path) -> Path:
    """Write the package under a folder, which goes on PYTHONPATH."""
    package = folder / "vbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "utils.py").write_text(UTILS)
    (package / "VBench_full_info.json").write_text(INFO)
    for name in ("subject_consistency", "overall_consistency", "scene"):
        (package / f"{name}.py").write_text("")
    (folder / "torch.py").write_text("device = str\n")  # all that the runner needs of it, and seconds sooner
    (package / "dynamic_degree.py").write_text("import a_module_that_is_not_there\n")
    return folder
