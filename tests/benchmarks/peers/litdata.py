"""litdata: its own chunks of JPEG bytes, PIL decodes, torchvision's transforms crop.

Its own JPEG decoding is torchvision's compiled part, which wants the CUDA build of torch.

python -m tests.benchmarks.peers.litdata write IMAGES OUT    makes the data set
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize
from PIL import Image

from tests.benchmarks.peers.data_sets import labelled_images
from tests.benchmarks.peers.stock_transforms import TrainingTransform
from tests.benchmarks.peers.timing import Request, Sizes, run_requested

CHUNK_BYTES = 1 << 25


def stored(image: tuple[str, int]) -> dict[str, Any]:
    path, label = image
    return {"image": Path(path).read_bytes(), "label": label}


def write(images: Path, directory: Path) -> None:
    """JPEG files are stored as they are."""
    inputs = [(str(path), label) for path, label in labelled_images(images)]
    optimize(stored, inputs, output_dir=str(directory), chunk_bytes=CHUNK_BYTES, num_workers=1)


def training(request: Request) -> Sizes:
    """uint8 batches, in this process alone."""
    crop = TrainingTransform(request.image_size)

    def transform(sample: dict[str, Any]) -> Any:
        with Image.open(BytesIO(sample["image"])) as image:
            return crop(image.convert("RGB")), sample["label"]

    dataset = StreamingDataset(request.data, shuffle=True, transform=transform)
    while True:
        for images, _ in StreamingDataLoader(dataset, batch_size=request.batch_size):
            yield len(images)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        run_requested({"training": training})
