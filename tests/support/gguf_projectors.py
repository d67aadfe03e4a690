"""Write projector files: vision towers of two layers, all weights zero, that llama-server loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    #: pixels; both divide evenly
    image: int
    patch: int = 14
    width: int
    heads: int
    inner: int
    #: width of the language model
    out: int

    @property
    def positions(self) -> int:
        return (self.image // self.patch) ** 2 + 1


def write(tower: Tower, path: Path) -> Path:
    """Write a tower of LLaVA's first kind ("mlp")."""
    writer = GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    numbers = {
        "image_size": tower.image,
        "patch_size": tower.patch,
        "embedding_length": tower.width,
        "feed_forward_length": tower.inner,
        "block_count": LAYERS,
        "attention.head_count": tower.heads,
        "projection_dim": tower.out,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    for name, shape in _tensors(tower).items():
        # matrices and convolutions are f16, the rest f32, as in real files
        kind = np.float16 if len(shape) > 1 else np.float32
        writer.add_tensor(name, np.zeros(shape, dtype=kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(tower: Tower) -> dict[str, tuple[int, ...]]:
    width, inner, out = tower.width, tower.inner, tower.out
    tensors: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (width, 3, tower.patch, tower.patch),
        "v.position_embd.weight": (tower.positions, width),
        "v.class_embd": (width,),
    }
    matrices = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width)}
    matrices |= {"attn_out": (width, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    for layer in range(LAYERS):
        for name, shape in matrices.items():
            tensors[f"v.blk.{layer}.{name}.weight"] = shape
            tensors[f"v.blk.{layer}.{name}.bias"] = shape[:1]
    norms = ["v.pre_ln", "v.post_ln", *(f"v.blk.{i}.ln{n}" for i in range(LAYERS) for n in (1, 2))]
    tensors |= {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    for name, shape in {"mm.0": (out, width), "mm.2": (out, out)}.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": (out,)}
    return tensors
