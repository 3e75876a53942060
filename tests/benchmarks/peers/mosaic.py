"""mosaicml-streaming: its own shards of JPEGs, PIL decodes, torchvision's transforms crop.

python -m tests.benchmarks.peers.mosaic write IMAGES OUT    makes the data set
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.library import Library
from torch.utils.data import DataLoader, default_collate

from tests.benchmarks.peers.data_sets import labelled_images
from tests.benchmarks.peers.stock_transforms import TrainingTransform
from tests.benchmarks.peers.timing import Request, Sizes, run_requested

SHARD_BYTES = 1 << 25


def imported() -> Any:
    """The module `streaming`.

    It imports torchvision, whose wheels want the CUDA build of torch: beside another one their
    compiled part does not load, and the import fails for want of two operators that nobody calls.
    """
    operators = Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        signature = f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor"
        operators.define(signature)  # type: ignore[no-untyped-call]
    import streaming

    return streaming


def write(images: Path, directory: Path) -> None:
    """JPEG files are stored as they are."""
    columns = {"image": "jpeg", "label": "int"}
    with imported().MDSWriter(
        out=str(directory), columns=columns, size_limit=SHARD_BYTES
    ) as writer:
        for path, label in labelled_images(images):
            with Image.open(path) as image:
                writer.write({"image": image, "label": label})


def training(request: Request) -> Sizes:
    """uint8 batches, in this process alone."""
    dataset = imported().StreamingDataset(
        local=request.data, shuffle=True, batch_size=request.batch_size
    )
    transform = TrainingTransform(request.image_size)

    def collate(samples: Sequence[dict[str, Any]]) -> Any:
        return default_collate(
            [(transform(sample["image"].convert("RGB")), sample["label"]) for sample in samples]
        )

    while True:
        for images, _ in DataLoader(dataset, batch_size=request.batch_size, collate_fn=collate):
            yield len(images)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run_requested({"training": training})
