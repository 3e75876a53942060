"""Files of weights: read from any program's, written for any program.

    read      .h5, .keras              Keras Applications
              .pt, .pth, .safetensors  a state_dict: ours, timm's, pretrainedmodels'
              a directory              our checkpoint, or a run, whose newest checkpoint is taken
    written   .safetensors, .pt        our state_dict; the first also says the network's options
              .onnx                    for inference on any number of images
              .weights.h5              for the same network in Keras 3

A file that is written appears whole or not at all.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from datapipe.json_text import parse_json
from datapipe.storage import read_bytes, write_bytes
from xdist import checkpoint
from xdist.errors import UserError
from xdist.extras import require
from xdist.keras_files import keras_payload, read_keras
from xdist.model_config import MODEL_NAMES, ModelConfig
from xdist.naming import KERAS, namings
from xdist.plain_config import from_json
from xdist.state import AVERAGE, STATISTICS, STATISTICS_AVERAGE, WEIGHTS, WeightsName
from xdist.weights import Fitted, Found, fit

KERAS_SUFFIXES = (".h5", ".keras")
FILE_SUFFIXES = (*KERAS_SUFFIXES, ".pt", ".pth", ".safetensors")
TARGET_SUFFIXES = (".safetensors", ".pt", ".onnx", ".weights.h5")
MODEL_KEY = "xdist.model"
DAMAGED_PICKLE = (
    pickle.UnpicklingError, struct.error, AssertionError, EOFError, LookupError, MemoryError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def read_file(url: str, *, model: str | None) -> Fitted:
    """The weights in the file `url` (`FILE_SUFFIXES`). Raises `UserError` for what is not such a
    file, or fits no network.

    `model`: the network's name, or the config.json of a run of it; None recognises it.
    """
    models = _models(model)
    payload = read_bytes(url)
    if url.endswith(KERAS_SUFFIXES):
        return fit(read_keras(url, payload), models)
    if not url.endswith(".safetensors"):
        return fit(_read_torch(url, payload), models)
    found, written_for = _read_safetensors(url, payload)
    return fit(found, [written_for] if written_for is not None and model is None else models)


def read_checkpoint(url: str, *, weights: WeightsName | None) -> Fitted:
    """The weights of a checkpoint, or of a run's newest; None is averaged ones if it has them."""
    opened, _ = checkpoint.find(url)
    manifest = opened.manifest
    layout = manifest.layout
    tensors = opened.read_range(0, layout.num_weights) | opened.read_statistics()
    if weights == "average" and AVERAGE not in tensors:
        raise UserError(f"{opened.url}: the run kept no average of the weights; use raw ones")
    raw = weights == "raw" or AVERAGE not in tensors
    values, statistics = (WEIGHTS, STATISTICS) if raw else (AVERAGE, STATISTICS_AVERAGE)
    named = {entry.name: entry.view(tensors[values]) for entry in layout.parameters}
    named |= {entry.name: entry.view(tensors[statistics]) for entry in layout.statistics}
    model = _model_from_json(opened.url, manifest.config["model"])
    return fit(Found(opened.url, named), [model])


def _models(model: str | None) -> list[ModelConfig]:
    """All networks as published, the one of that name, or that of a config.json."""
    if model is None:
        networks = [ModelConfig(name=name) for name in MODEL_NAMES]
        return [*networks, ModelConfig(name="inception_v3", layout="2016")]
    if not model.endswith(".json"):
        return [ModelConfig(name=model)]
    try:
        value = parse_json(read_bytes(model))["model"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{model}: not the config.json of a run ({error})") from error
    return [_model_from_json(model, value)]


def _model_from_json(source: str, value: Mapping[str, Any] | str) -> ModelConfig:
    """value: or the text of it."""
    try:
        return from_json(ModelConfig, parse_json(value) if isinstance(value, str) else value)
    except ValueError as error:
        raise UserError(
            f"{source}: not the options of a network that this version knows ({error})"
        ) from error


def _read_safetensors(url: str, payload: bytes) -> tuple[Found, ModelConfig | None]:
    """The tensors, and the network's options where we wrote the file."""
    try:
        tensors = safetensors.torch.load(payload)
    except safetensors.SafetensorError as error:
        raise UserError(f"{url}: not readable as safetensors ({error})") from error
    header = parse_json(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    said = header.get("__metadata__", {}).get(MODEL_KEY)
    model = None if said is None else _model_from_json(url, said)
    return Found(url, _cleaned(tensors)), model


def _read_torch(url: str, payload: bytes) -> Found:
    """A `state_dict`, or a dict with one under that name; no code in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles that torch did not write
            value = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except DAMAGED_PICKLE as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{url}: not readable as a state_dict of torch ({reason})") from error
    if isinstance(value, dict):
        value = value.get("state_dict", value)
    if not isinstance(value, dict) or not all(isinstance(item, Tensor) for item in value.values()):
        raise UserError(f"{url}: holds no state_dict, which is a dict of names and tensors")
    return Found(url, _cleaned(value))


def _cleaned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without counters of batches, and with pretrainedmodels' Xception in timm's form: it has
    another name for the classifier, and pointwise kernels without their axes of size 1.
    """
    tensors = {}
    for name, tensor in state.items():
        if name.endswith(".num_batches_tracked"):
            continue
        if name.endswith(".pointwise.weight") and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        tensors[name.replace("last_linear.", "fc.")] = tensor.detach()
    return tensors


def write(url: str, fitted: Fitted, *, image_size: int) -> None:
    """Write the weights to the file `url`, as its name says (`TARGET_SUFFIXES`).

    `image_size`: pixels of a side of the images that an ONNX network takes.
    """
    state = fitted.network.state_dict()
    if url.endswith(".safetensors"):
        metadata = {"format": "pt", MODEL_KEY: json.dumps(asdict(fitted.model))}
        payload = safetensors.torch.save(state, metadata)
    elif url.endswith(".weights.h5"):
        payload = _keras_payload(url, fitted)
    elif url.endswith(".onnx"):
        payload = _onnx_payload(url, fitted.network, image_size=image_size)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
    write_bytes(url, payload)


def _keras_payload(url: str, fitted: Fitted) -> bytes:
    naming = namings(fitted.network).get(KERAS)
    if naming is None:
        raise UserError(
            f"{url}: a file of Keras cannot hold this {fitted.model.name}; allowed: xception of "
            "depthwise convolutions, and inception_v3"
        )
    state = fitted.network.state_dict()
    foreign = {name: place.foreign(state[place.name]) for name, place in naming.items()}
    return keras_payload(url, foreign)


def _onnx_payload(url: str, network: nn.Module, *, image_size: int) -> bytes:
    """images: (N, 3, image_size, image_size), float32 in [-1, 1] -> logits: (N, classes)."""
    require("onnxscript", extra="onnx", reason=f"{url} is a file of ONNX")
    images = torch.zeros(2, 3, image_size, image_size)  # torch takes an N of 1 for a constant
    try:
        with torch.inference_mode():
            network(images)
    except RuntimeError as error:
        raise UserError(f"images of {image_size} px do not go through the network") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about a class of its own
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())
