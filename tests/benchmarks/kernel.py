"""Decoding, cropping and scaling of real images, in turns: the kernel, the fallback, Pillow.

python -m tests.benchmarks.kernel --images ../shared/data/imagenet-sample

One thread, CPU time. Its last line is one JSON object: for training crops and the evaluation crop,
with plain files and re-muxed ones, images a second, the ratio to Pillow's decode and resize of the
plain file, and the mean absolute difference of the pixels to Pillow's; the growth of the files by
re-muxing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from datapipe import fallback
from datapipe.config import DataConfig
from datapipe.decode import Box, active_kernel, image_size
from datapipe.kernel import NativeKernel, load_kernel
from datapipe.transforms import augmentation_draws, evaluation_boxes, training_boxes

CHUNK = 16
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    images: Path
    """Directory of JPEG files."""
    side: int = 299
    """Pixels of a side of the output."""
    rounds: int = 5
    """Times that all files are decoded by each; the fastest round counts."""


@dataclass(frozen=True)
class Crops:
    """What is to be decoded of each file."""

    boxes: list[Box]
    flips: list[bool]


Decoder = Callable[[list[bytes], Crops, Images], None]


def crops_of(payloads: list[bytes], side: int) -> dict[str, Crops]:
    config = DataConfig(train="-", image_size=side)
    sizes = np.array([image_size(payload) for payload in payloads], np.float64)
    widths, heights = sizes[:, 0], sizes[:, 1]
    numbers = np.arange(len(payloads), dtype=np.int64)
    draws = augmentation_draws(0, np.zeros_like(numbers), numbers)
    boxes, flips = training_boxes(widths, heights, draws, config)
    centre = evaluation_boxes(widths, heights, config)
    return {
        "training": Crops([tuple(box) for box in boxes.tolist()], flips.tolist()),
        "evaluation": Crops([tuple(box) for box in centre.tolist()], [False] * len(payloads)),
    }


def by_pillow(payloads: list[bytes], crops: Crops, outs: Images) -> None:
    for payload, box, flip, out in zip(payloads, crops.boxes, crops.flips, outs, strict=True):
        with Image.open(BytesIO(payload)) as image:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            scaled = rgb.resize(out.shape[:2], Image.Resampling.BILINEAR, box=box)
        out[...] = np.asarray(scaled)[:, ::-1] if flip else np.asarray(scaled)


def by_fallback(payloads: list[bytes], crops: Crops, outs: Images) -> None:
    for payload, box, flip, out in zip(payloads, crops.boxes, crops.flips, outs, strict=True):
        fallback.decode_into(payload, box, flip, out)


def by_kernel(kernel: NativeKernel) -> Decoder:
    def decode(payloads: list[bytes], crops: Crops, outs: Images) -> None:
        for start in range(0, len(payloads), CHUNK):
            chunk = slice(start, start + CHUNK)
            reasons = kernel.decode_batch(
                payloads[chunk], crops.boxes[chunk], crops.flips[chunk], list(outs[chunk])
            )
            if any(reasons):
                raise ValueError(f"not decoded: {list(filter(None, reasons))}")

    return decode


def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)
    console = Console(stderr=True)
    paths = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() == ".jpeg")
    payloads = [path.read_bytes() for path in paths]
    console.print(f"{len(payloads)} files; kernel: {active_kernel()}")
    decoders: dict[str, tuple[Decoder, list[bytes]]] = {
        "pillow": (by_pillow, payloads),
        "fallback": (by_fallback, payloads),
    }
    result: dict[str, object] = {"images": len(payloads), "kernel": active_kernel().name}
    kernel = load_kernel().kernel
    if kernel is not None:
        remuxed = [kernel.remux(payload) for payload in payloads]
        decoders["fallback_remuxed"] = (by_fallback, remuxed)
        decoders["native"] = (by_kernel(kernel), payloads)
        decoders["native_remuxed"] = (by_kernel(kernel), remuxed)
        result["remuxed_bytes_ratio"] = sum(map(len, remuxed)) / sum(map(len, payloads))
    for name, crops in crops_of(payloads, arguments.side).items():
        result[name] = measured(decoders, crops, arguments, console, title=name)
    sys.stdout.write(json.dumps(result) + "\n")


def measured(
    decoders: dict[str, tuple[Decoder, list[bytes]]],
    crops: Crops,
    arguments: Arguments,
    console: Console,
    *,
    title: str,
) -> dict[str, dict[str, float]]:
    """Each decoder's images_s, ratio_vs_pillow and pixel_diff_mean."""
    shape = (len(crops.boxes), arguments.side, arguments.side, 3)
    outs = {name: np.zeros(shape, np.uint8) for name in decoders}
    seconds = {name: float("inf") for name in decoders}
    for _ in range(arguments.rounds):
        for name, (decode, payloads) in decoders.items():
            start = time.thread_time()
            decode(payloads, crops, outs[name])
            seconds[name] = min(seconds[name], time.thread_time() - start)
    table = Table("decoder", "images/s", "ratio to Pillow", "pixel difference", title=title)
    found = {}
    for name in decoders:
        difference = np.abs(outs[name].astype(np.int16) - outs["pillow"]).mean()
        found[name] = {
            "images_s": len(crops.boxes) / seconds[name],
            "ratio_vs_pillow": seconds["pillow"] / seconds[name],
            "pixel_diff_mean": float(difference),
        }
        table.add_row(name, *(f"{value:.3f}" for value in found[name].values()))
    console.print(table)
    return found


if __name__ == "__main__":
    main(tyro.cli(Arguments))
