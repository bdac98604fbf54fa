"""Outputs of exported files in ComfyUI on the CPU; run by `comfyui.py` in an interpreter that has what ComfyUI needs.

    python comfyui_forward.py COMFYUI_FOLDER INPUTS.safetensors OUTPUTS.safetensors FILE.safetensors ...

A file is loaded as by the node "Load Diffusion Model" and called once in fp32. Prints JSON: versions, and for each
file the class that ComfyUI detects and the number of linears by quantized format.
"""

import collections
import json
import sys
from importlib.metadata import version


def main() -> None:
    """Load each file, write its output under the file's name."""
    folder, inputs_file, outputs_file, *files = sys.argv[1:]
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, folder)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import comfyui_version
    import torch
    from safetensors.torch import load_file, save_file

    inputs = load_file(inputs_file)
    arguments = {name.removeprefix("comfyui."): value for name, value in inputs.items() if name.startswith("comfyui.")}
    arguments.setdefault("attention_mask", None)
    outputs, found = {}, {}
    for file in files:
        loaded = comfy.sd.load_diffusion_model(file, model_options={"dtype": torch.float32})
        comfy.model_management.load_models_gpu([loaded])
        model = loaded.model.diffusion_model
        formats = [module.quant_format for module in model.modules() if getattr(module, "quant_format", None)]
        with torch.no_grad():
            outputs[file] = model(**arguments).float().contiguous()
        found[file] = {"detected": type(loaded.model).__name__, "linears": dict(collections.Counter(formats))}
    save_file(outputs, outputs_file)
    versions = {"comfyui": comfyui_version.__version__, "comfy-kitchen": version("comfy-kitchen")}
    print(json.dumps({"versions": versions | {"torch": torch.__version__}, "files": found}))


if __name__ == "__main__":
    main()
