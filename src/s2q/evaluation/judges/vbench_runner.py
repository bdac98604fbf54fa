"""Script for the interpreter with VBench: imports the standard library and vbench only, since s2q is missing there.

    python vbench_runner.py check|judge REQUEST.json ANSWER.json

`check` says which version it is, what it can judge, and what a dimension lacks. `judge` scores a folder of videos. Both
write ANSWER.json; with no such file the run has failed, and its output says how.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
import urllib.request
from importlib import metadata

FLOW = "flow_score"
_DOWNLOADERS = ("wget", "curl", "git", "unzip")


def main(task, request_path, answer_path):
    """Carry out a task: read its request, write its answer."""
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    if request["offline"]:
        _refuse_downloads()
    answer = {"check": check, "judge": judge}[task](request)
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer, file)


def check(request):
    """Say what VBench is there, and what keeps it from judging.

    The request has the `dimensions` that may be judged, `local` (weights from VBench's cache folder) and a `folder` to
    work in. The answer is `error` if vbench cannot be imported; else `version`, `dimensions`, `custom` (those for
    prompts that are not VBench's), `prompts` (VBench's, each with its dimensions) and `problems` (text by dimension).
    """
    try:
        import vbench

        info_path = _full_info(vbench)
        judge_of_all = vbench.VBench("cpu", info_path, request["folder"])
    except Exception as error:
        return {"error": _text_of(error)}
    with open(info_path, encoding="utf-8") as file:
        info = json.load(file)
    dimensions = judge_of_all.build_full_dimension_list()
    named = [name for name in request["dimensions"] if name in dimensions or name == FLOW]
    problems = {name: _problem(name, request["local"]) for name in named}
    return {
        "version": _version(),
        "dimensions": dimensions,
        "custom": [name for name in dimensions if _takes_custom(judge_of_all, name)],
        "prompts": [{"prompt": entry["prompt_en"], "dimensions": entry["dimension"]} for entry in info],
        "problems": {name: problem for name, problem in problems.items() if problem},
    }


def judge(request):
    """Score a folder of videos.

    The request has `videos` (folder), `prompts` (prompt by file; empty for VBench's own, which the file names say),
    `dimensions`, `device`, `local` and a `folder` to work in. The answer is for each dimension its score and a list of
    `video_path` and `video_results`, as VBench writes them.
    """
    import torch
    import vbench

    device = torch.device(request["device"])
    dimensions = [name for name in request["dimensions"] if name != FLOW]
    scores = {}
    if dimensions:
        vbench.VBench(device, _full_info(vbench), request["folder"]).evaluate(
            videos_path=request["videos"],
            name="scores",
            prompt_list=request["prompts"],
            dimension_list=dimensions,
            local=request["local"],
            mode="custom_input" if request["prompts"] else "vbench_standard",
        )
        with open(os.path.join(request["folder"], "scores_eval_results.json"), encoding="utf-8") as file:
            scores = json.load(file)
    if FLOW in request["dimensions"]:
        scores[FLOW] = _flow(request["videos"], device, request["local"])
    return scores


def _flow(folder, device, local):
    """EvalCrafter's flow score: mean length of RAFT's flow in pixels, over pixels and pairs of frames of a video."""
    import cv2
    import torch
    from vbench.dynamic_degree import DynamicDegree, InputPadder, edict
    from vbench.utils import init_submodules

    weights = init_submodules(["dynamic_degree"], local=local)["dynamic_degree"]["model"]
    raft = DynamicDegree(edict(model=weights, small=False, mixed_precision=False, alternate_corr=False), device).model
    videos = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        reader, frames = cv2.VideoCapture(path), []
        while True:
            is_read, frame = reader.read()
            if not is_read:
                break
            levels = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
            frames.append(levels.float()[None].to(device))
        if len(frames) < 2:
            raise ValueError(f"{path}: {len(frames)} frames could be decoded; a flow needs two")
        lengths = []
        with torch.no_grad():
            for pair in zip(frames, frames[1:]):  # noqa: B905
                _, flow = raft(*InputPadder(pair[0].shape).pad(*pair), iters=20, test_mode=True)
                lengths.append(flow[0].norm(dim=0).mean().item())
        videos.append({"video_path": path, "video_results": sum(lengths) / len(lengths)})
    return [sum(video["video_results"] for video in videos) / len(videos), videos]


def _problem(name, local):
    """Return why a dimension cannot be judged here, None if it can: its module and its weights are looked for."""
    needed = "dynamic_degree" if name == FLOW else name
    try:
        importlib.import_module("vbench." + needed)
        from vbench.utils import init_submodules

        init_submodules([needed], local=local)
    except Exception as error:
        return _text_of(error)
    return None


def _takes_custom(judge_of_all, name):
    try:
        judge_of_all.check_dimension_requires_extra_info([name])
    except AssertionError:
        return False
    return True


def _refuse_downloads():
    """Make what VBench downloads with fail at once and say what is missing."""
    run = subprocess.run

    def offline_run(command, *args, **options):
        if isinstance(command, (list, tuple)) and os.path.basename(str(command[0])) in _DOWNLOADERS:
            raise FileNotFoundError("weights are missing, and HF_HUB_OFFLINE forbids: " + " ".join(map(str, command)))
        return run(command, *args, **options)

    def offline_retrieve(url, *args, **options):
        raise FileNotFoundError("weights are missing, and HF_HUB_OFFLINE forbids: " + str(url))

    subprocess.run = offline_run
    urllib.request.urlretrieve = offline_retrieve


def _full_info(vbench):
    return os.path.join(os.path.dirname(os.path.abspath(vbench.__file__)), "VBench_full_info.json")


def _version():
    try:
        return metadata.version("vbench")
    except metadata.PackageNotFoundError:
        return "unknown"


def _text_of(error):
    return traceback.format_exception_only(type(error), error)[-1].strip()


if __name__ == "__main__":
    main(*sys.argv[1:4])
