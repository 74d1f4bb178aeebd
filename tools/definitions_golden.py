"""Make tests/golden/definitions.json and .npz: what others compute for the norms that they define.

It needs an environment of its own, of Python 3.11 (torch==2.13.0, the CPU build; keras==3.15.1,
keras-hub==0.32.0 and timm==1.0.31, both with --no-deps; numpy==2.4.6, tokenizers, kagglehub,
huggingface_hub, safetensors, pyyaml, regex):

    KERAS_BACKEND=torch python tools/definitions_golden.py

RevIN, of which there is no package, is written here from its paper.
"""

import functools
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from keras_hub.src.models.gemma.rms_normalization import RMSNormalization
from keras_hub.src.models.stable_diffusion_3.mmdit import AdaptiveLayerNormalization

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
RELU = 1.7139588594436646


@functools.cache
def timm_layers():
    """The two modules of timm's, without the rest of it, which needs torchvision."""
    for name in ("timm", "timm.layers"):
        package = types.ModuleType(name)
        package.__path__ = importlib.util.find_spec(name).submodule_search_locations
        sys.modules[name] = package
    from timm.layers import grn, std_conv

    return grn, std_conv


def gemma_rms_norm(draw):
    """RMS norm of KerasHub's Gemma: x / sqrt(mean(x^2) + epsilon) * (1 + scale)."""
    inputs = {"x": draw(2, 5, 8), "scale": draw(8)}
    layer = RMSNormalization(epsilon=1e-5)
    return {"epsilon": 1e-5}, inputs, of_keras(layer, ["scale"])(inputs)


def adaptive_layer_norm(draw):
    """KerasHub's of Stable Diffusion 3: shift and scale by a dense layer of an embedding's silu."""
    inputs = {"x": draw(2, 5, 8), "embedding": draw(2, 4), "kernel": draw(4, 16), "bias": draw(16)}
    layer = AdaptiveLayerNormalization(8)
    return {"epsilon": 1e-6}, inputs, of_keras(layer, ["kernel", "bias"])(inputs)


def of_keras(layer, weights):
    """A function of inputs by name, the layer's weights at the end."""

    def call(inputs):
        given = [tensor for name, tensor in inputs.items() if name not in weights]
        layer(*given)
        values = [inputs[name] for name in weights]
        return layer.stateless_call(values, [], *given)[0]

    return call


def global_response(draw, channels_last):
    """GlobalResponseNorm of timm: x + bias + weight * x * n."""
    grn, _ = timm_layers()
    shape = (2, 4, 3, 6) if channels_last else (2, 6, 4, 3)
    inputs = {"x": draw(*shape), "weight": draw(6), "bias": draw(6)}
    module = grn.GlobalResponseNorm(6, channels_last=channels_last)
    weights = {name: inputs[name] for name in ("weight", "bias")}
    y = torch.func.functional_call(module, weights, inputs["x"])
    return {"axis": -1 if channels_last else 1}, inputs, y


def standardized(draw, scaled):
    """StdConv2d and ScaledStdConv2d of timm, told in Keras's order of axes."""
    _, std_conv = timm_layers()
    inputs = {"kernel": draw(3, 2, 3, 4), "bias": draw(4), "x": draw(2, 6, 5, 3)}
    weights = {"weight": inputs["kernel"].permute(3, 2, 0, 1), "bias": inputs["bias"]}
    options = {"epsilon": 1e-5}
    if scaled:
        inputs = {"gain": draw(4), **inputs}
        weights["gain"] = inputs["gain"].reshape(4, 1, 1, 1)
        options |= {"scaled": True, "gamma": RELU}
    kind = std_conv.ScaledStdConv2d if scaled else std_conv.StdConv2d
    gamma = {"gamma": RELU} if scaled else {}
    module = kind(3, 4, (3, 2), stride=2, padding=0, bias=True, eps=1e-5, **gamma)
    y = torch.func.functional_call(module, weights, inputs["x"].permute(0, 3, 1, 2))
    return options, inputs, y.permute(0, 2, 3, 1)


def reversible(draw):
    """RevIN: equations 1 to 3 of its paper, and between the two ways a forecast of 3 steps.

    The forecast is the last step, times a factor for each of its steps and features.
    """
    inputs = {"x": draw(2, 5, 6), "weight": draw(6), "bias": draw(6), "factor": draw(2, 3, 6)}
    x, weight, bias, factor = inputs.values()
    epsilon = 1e-5
    mean = x.mean(1, keepdim=True)
    deviation = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + epsilon)
    y = weight * (x - mean) / deviation + bias
    forecast = (y[:, -1:] * factor - bias) / (weight + epsilon**2) * deviation + mean
    outputs = torch.cat([each.reshape(-1) for each in (y, mean, deviation, forecast)])
    return {"epsilon": epsilon}, inputs, outputs


CASES = {
    "gemma_rms_norm": gemma_rms_norm,
    "adaptive_layer_norm": adaptive_layer_norm,
    "global_response_last": lambda draw: global_response(draw, True),
    "global_response_first": lambda draw: global_response(draw, False),
    "standardized": lambda draw: standardized(draw, False),
    "scaled_standardized": lambda draw: standardized(draw, True),
    "reversible": reversible,
}


def run(name, rng):
    """One case: its description, and its arrays by name."""

    def draw(*shape):
        # No value is near 0, by which some are divided.
        values = rng.uniform(0.3, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
        return torch.tensor(values.astype("float32"), requires_grad=True)

    options, inputs, y = CASES[name](draw)
    cotangent = torch.tensor(rng.normal(size=y.shape).astype("float32"))
    slopes = torch.autograd.grad(y, list(inputs.values()), cotangent)
    arrays = {"y": y, "cotangent": cotangent, **inputs}
    arrays |= {f"d_{each}": slope for each, slope in zip(inputs, slopes, strict=True)}
    described = {"options": options, "inputs": list(inputs)}
    return described, {f"{name}/{key}": each.detach().numpy() for key, each in arrays.items()}


def main():
    """Write both files."""
    rng = np.random.default_rng(0)
    found = {name: run(name, rng) for name in CASES}
    packages = ("keras", "keras-hub", "timm", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    arrays = {key: value for _, stored in found.values() for key, value in stored.items()}
    np.savez_compressed(FOLDER / "definitions.npz", **arrays)
    described = {name: case for name, (case, _) in found.items()}
    text = json.dumps({"versions": versions, "cases": described}, indent=1)
    (FOLDER / "definitions.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
