"""LoRA adapters with random weights."""

import peft
import torch

TARGETS = ["to_q", "to_v", "ff.net.2", "ffn.net.2"]


def save_lora(pipe, path, *, component="transformer", seed=0, alpha=4, **options):
    """Save a random adapter for a transformer of a pipeline, which is left without it."""
    torch.manual_seed(seed)
    transformer = getattr(pipe, component)
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False, **options)
    transformer.add_adapter(config)
    adapted = peft.get_peft_model_state_dict(transformer)
    path.mkdir(parents=True, exist_ok=True)
    type(pipe).save_lora_weights(
        path,
        transformer_lora_layers=adapted,
        transformer_lora_adapter_metadata=config.to_dict() | {"target_modules": TARGETS, "peft_type": "LORA"},
    )
    transformer.delete_adapters("default")
    pipe.unload_lora_weights()
    return path / "pytorch_lora_weights.safetensors"
