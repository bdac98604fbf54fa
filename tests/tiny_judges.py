"""A tiny CLIP model and LPIPS weights, random: plumbing, not judgement."""

from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

SIDE = 32
CONTEXT = 12


def save_tiny_clip(folder: Path) -> Path:
    """Save model and tokenizer; letters are tokens, so that every text has some."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextConfig(**size, **ends, vocab_size=len(names), max_position_embeddings=CONTEXT, projection_dim=8)
    vision = CLIPVisionConfig(**size, image_size=SIDE, patch_size=16, projection_dim=8)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_lpips(path: Path) -> Path:
    """Save weights of AlexNet's kind, its later layers with few channels."""
    torch.manual_seed(0)
    shapes = {"1.0": (64, 3, 11), "2.3": (6, 64, 5), "3.6": (6, 6, 3), "4.8": (6, 6, 3), "5.10": (6, 6, 3)}
    tensors = {}
    for stage, (name, (out, into, size)) in enumerate(shapes.items()):
        tensors[f"net.slice{name}.weight"] = torch.randn(out, into, size, size)
        tensors[f"net.slice{name}.bias"] = torch.randn(out)
        tensors[f"lin{stage}.model.1.weight"] = torch.rand(1, out, 1, 1)
    torch.save(tensors, path)
    return path
