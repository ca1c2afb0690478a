"""Model folders whose weights are quantised, as their publishers write them. Each function rewrites a folder that was saved with
one file in bfloat16, and returns the weights that its quantised tensors stand for, by name."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from liftdist.engine.quantisation import NF4

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """The experts of a gpt-oss model."""

    def of_experts(name, weights):
        if ".experts." not in name or name.endswith("bias"):
            return None
        groups = weights.mT.float().unflatten(2, (-1, 32))  # [E, n, g, 32]
        exponents = groups.abs().amax(3, keepdim=True).log2().floor().clamp(min=-100) - 2
        codes = (groups.unsqueeze(4) / exponents.exp2().unsqueeze(4) - E2M1).abs().argmin(4)
        values = (E2M1[codes] * exponents.exp2()).flatten(2).mT
        pairs = codes.to(torch.uint8).unflatten(3, (16, 2))
        blocks = pairs[..., 0] | pairs[..., 1] << 4
        return values, {f"{name}_blocks": blocks, f"{name}_scales": (exponents.squeeze(3) + 127).to(torch.uint8)}

    return _rewrite(folder, dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]), of_experts)


def fp8(folder: Path, block: tuple[int, int] | None, **settings) -> dict[str, torch.Tensor]:
    """The matrices of the layers, by blocks, or with one scale each; as mxfp8 with powers of two."""
    is_mx = settings.get("quant_method") == "mxfp8"

    def of_layers(name, weights):
        if not _is_quantised(name, weights):
            return None
        codes, scales, values = _scaled(weights, block or weights.shape, torch.uint8 if is_mx else torch.float32)
        stored = {name: codes, f"{name}_scale_inv": scales if block else scales.squeeze()}
        of_inputs = {f"{name.removesuffix('.weight')}.activation_scale": torch.ones(())}
        return values, stored | ({} if block else of_inputs)

    said = dict(quant_method="fp8", activation_scheme="dynamic" if block else "static", weight_block_size=block)
    return _rewrite(folder, said | settings, of_layers)


def compressed(folder: Path, strategy: str) -> dict[str, torch.Tensor]:
    """The matrices of the layers in float8, by compressed-tensors: a scale for each ``tensor``, ``channel`` or ``block``."""
    block = [48, 32]

    def of_layers(name, weights):
        if not _is_quantised(name, weights):
            return None
        size = {"tensor": weights.shape, "channel": (1, weights.shape[1]), "block": block}[strategy]
        codes, scales, values = _scaled(weights, size, torch.bfloat16)
        return values, {name: codes, f"{name}_scale": scales.view(1) if strategy == "tensor" else scales}

    weights = dict(num_bits=8, type="float", strategy=strategy, block_structure=block if strategy == "block" else None)
    group = dict(targets=["Linear"], weights=weights)
    settings = dict(quant_method="compressed-tensors", format="float-quantized", config_groups={"group_0": group})
    return _rewrite(folder, settings, of_layers)


def nf4(folder: Path, nested: bool, storage: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    """The matrices of the layers, by bitsandbytes."""

    def of_layers(name, weights):
        if not _is_quantised(name, weights):
            return None
        flat = weights.float().flatten()
        blocks = pad(flat, (0, -len(flat) % 64)).view(-1, 64)
        scales, about = (
            blocks.abs().amax(1),
            dict(quant_type="nf4", blocksize=64, dtype="bfloat16", shape=list(weights.shape)),
        )
        of_scales = {f"{name}.absmax": scales, f"{name}.quant_map": torch.tensor(NF4)}
        if nested:
            levels, offset = torch.linspace(-1, 1, 256), scales.mean()
            outer = pad(scales - offset, (0, -len(scales) % 256)).view(-1, 256)
            largest = outer.abs().amax(1)
            codes = ((outer / largest[:, None]).flatten()[: len(scales), None] - levels).abs().argmin(1)
            scales = levels[codes] * largest.repeat_interleave(256)[: len(scales)] + offset.item()
            of_scales |= {f"{name}.absmax": codes.to(torch.uint8), f"{name}.nested_absmax": largest}
            of_scales |= {f"{name}.nested_quant_map": levels}
            about |= dict(nested_blocksize=256, nested_dtype="float32", nested_offset=offset.item())
        codes = (blocks / scales[:, None]).unsqueeze(2).sub(torch.tensor(NF4)).abs().argmin(2)
        values = (torch.tensor(NF4)[codes] * scales[:, None]).flatten()[: len(flat)].view(weights.shape)
        pairs = codes.flatten()[: len(flat)].to(torch.uint8).view(-1, 2)
        packed = (pairs[:, 0] << 4 | pairs[:, 1]).view(storage).view(-1, 1)
        state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        return values, {name: packed, f"{name}.quant_state.bitsandbytes__nf4": state} | of_scales

    settings = dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="nf4")
    return _rewrite(folder, settings, of_layers)


def _is_quantised(name, weights):
    """Publishers leave the head, embeddings and routers as they are."""
    return ".layers." in name and weights.ndim == 2 and ".mlp.gate." not in name


def _scaled(weights, block, dtype=torch.float32):
    """Codes, the scales ``[m / a, n / b]`` of blocks ``[a, b]``, in bytes their exponents, and the values of ``[m, n]``."""
    (rows, columns), (down, across) = weights.shape, block
    whole = pad(weights.float(), (0, -columns % across, 0, -rows % down))
    blocks = whole.unflatten(1, (-1, across)).unflatten(0, (-1, down))  # [m / a, a, n / b, b]
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-12) / 448
    if dtype == torch.uint8:
        stored = scales.log2().ceil() + 127
        scales = (stored - 127).exp2()
    else:
        stored = scales
        scales = stored.to(dtype).float()
    codes = (blocks / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    cut = [part.flatten(2).flatten(0, 1)[:rows, :columns].contiguous() for part in (codes, codes.float() * scales)]
    return cut[0], stored[:, 0, :, 0].to(dtype), cut[1]


def _rewrite(folder, settings, quantise):
    file, config = folder / "model.safetensors", folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
    stored, meant = {}, {}
    for name, weights in load_file(file).items():
        found = quantise(name, weights)
        if found is None:
            stored[name] = weights
        else:
            meant[name] = found[0].bfloat16().contiguous()
            stored |= {part: tensor.contiguous() for part, tensor in found[1].items()}
    save_file(stored, file, {"format": "pt"})
    assert meant
    return meant
