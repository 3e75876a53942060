"""Weights in Keras' files: `.h5` of Keras 2 and 3, and the archive `.keras`, by h5py alone.

Either layout of an `.h5` is read into the names that `naming` has for Keras. Keras 3 writes these
itself; the older layout lists the layers in the order of the graph, so they are counted here.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdist.errors import UserError
from xdist.extras import require
from xdist.weights import Found

IN_ARCHIVE = "model.weights.h5"
LAYERS = ("layers", "_layer_checkpoint_dependencies")  # the second in TensorFlow 2.13
KINDS = {
    (4,): "conv2d",
    (4, 1): "conv2d",
    (4, 4): "separable_conv2d",
    (1, 1, 1): "batch_normalization",
    (1, 1, 1, 1): "batch_normalization",
    (2, 1): "dense",
}
"""The older layout does not say what a layer is: numbers of axes of its weights -> kind."""
DAMAGED = (
    OSError, LookupError, MemoryError, OverflowError, RuntimeError, TypeError, ValueError,
    zipfile.BadZipFile,
)  # fmt: skip


def read_keras(url: str, payload: bytes) -> Found:
    """The weights in an `.h5` or `.keras` file. Raises `UserError` for what is not one."""
    h5py = _h5py(url)
    try:
        if zipfile.is_zipfile(io.BytesIO(payload)):
            payload = zipfile.ZipFile(io.BytesIO(payload)).read(IN_ARCHIVE)
        with h5py.File(io.BytesIO(payload), "r") as file:
            return _read(url, file)
    except DAMAGED as error:
        raise UserError(f"{url}: not readable as weights of Keras ({error})") from error


def keras_payload(url: str, tensors: Mapping[str, Tensor]) -> bytes:
    """A `.weights.h5` of Keras 3, for the file `url`; `tensors`: named and shaped as Keras' are."""
    buffer = io.BytesIO()
    with _h5py(url).File(buffer, "w") as file:
        for name, tensor in tensors.items():
            file[name] = tensor.numpy()
    return buffer.getvalue()


def _h5py(url: str) -> Any:
    return require("h5py", extra="keras", reason=f"{url} is a file of Keras")


def _read(url: str, file: Any) -> Found:
    for layers in LAYERS:
        if layers in file:
            return Found(url, _read_tree(file[layers]))
    group = file.get("model_weights", file)
    if "layer_names" in group.attrs:
        return _read_list(url, group)
    raise ValueError(f"it holds {sorted(file)}, neither layers nor their names")


def _read_tree(group: Any) -> dict[str, Tensor]:
    """Keras 3's layout: `conv2d_3/vars/0` and so on. Integers are states of generators."""
    datasets: dict[str, Any] = {}
    group.visititems(lambda name, item: datasets.update({name: item} if _is_float(item) else {}))
    return {f"layers/{name}": _tensor(dataset) for name, dataset in datasets.items()}


def _is_float(item: Any) -> bool:
    return hasattr(item, "dtype") and item.dtype.kind not in "iu"


def _read_list(url: str, group: Any) -> Found:
    """The older layout: names of layers, and of every layer's weights, in attributes."""
    counts: Counter[str] = Counter()
    tensors: dict[str, Tensor] = {}
    labels: dict[str, str] = {}
    for layer in _texts(group.attrs["layer_names"]):
        names = _texts(group[layer].attrs["weight_names"])
        weights = [_tensor(group[layer][name]) for name in names]
        kind = KINDS.get(tuple(weight.ndim for weight in weights), layer)
        place = f"layers/{kind}_{counts[kind]}" if counts[kind] else f"layers/{kind}"
        counts[kind] += 1
        paths = [f"{place}/vars/{i}" for i in range(len(names))]
        tensors |= dict(zip(paths, weights, strict=True))
        labels |= dict(zip(paths, names, strict=True))
    return Found(url, tensors, labels)


def _texts(names: Iterable[Any]) -> list[str]:
    """h5py gives bytes or str, as the file has it."""
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _tensor(dataset: Any) -> Tensor:
    return torch.from_numpy(np.asarray(dataset, dtype=np.float32))
