"""Prediction: what a checkpoint says of images, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from datapipe.batch import normalize
from datapipe.config import DataConfig
from datapipe.decode import DecodeError, decode_into, image_size
from datapipe.errors import DataError
from datapipe.loose_images import LooseImage
from datapipe.transforms import evaluation_boxes
from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.scoring import load_model
from xdist.state import WeightsName


@dataclass(frozen=True)
class Guess:
    """One label of an image."""

    label: int
    score: float
    """Its probability: with softmax, among all labels; with sigmoids, of its own."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is said of one image."""

    image: LooseImage
    pixels: NDArray[np.uint8] | None
    """(S, S, 3), RGB: what the network saw of it."""
    guesses: tuple[Guess, ...]
    """The highest scores first."""
    error: str | None
    """Why there are none, if so."""


class Predictor:
    """A network of a checkpoint, in evaluation mode, on a GPU if this machine has one."""

    def __init__(
        self, checkpoint: Checkpoint, config: TrainConfig, weights: WeightsName, *, top_k: int
    ) -> None:
        """Raises as `scoring.load_model` does."""
        self.num_classes = checkpoint.manifest.layout.parameters[-1].shape[0]
        self._top_k = min(top_k, self.num_classes)
        self._is_softmax = config.loss == "softmax"
        self._data = config.data
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(config, self.num_classes, checkpoint, weights)
        self._model = model.to(self._device)

    def predict(self, images: Iterable[LooseImage], *, batch_size: int) -> Iterator[Prediction]:
        """In their order. What cannot be read or decoded has an error, and costs no other one."""
        images = iter(images)
        with ThreadPoolExecutor(self._data.decode_threads) as threads:
            while batch := list(islice(images, batch_size)):
                read = list(threads.map(self._read, batch))
                yield from self._of_batch(batch, read)

    def _read(self, image: LooseImage) -> NDArray[np.uint8] | str:
        """The pixels (S, S, 3), or why there are none."""
        side = self._data.image_size
        pixels = np.empty((side, side, 3), np.uint8)
        try:
            crop(image.read(), pixels, self._data)
        except (OSError, DataError, DecodeError) as error:
            return str(error)
        return pixels

    def _of_batch(
        self, batch: Sequence[LooseImage], read: Sequence[NDArray[np.uint8] | str]
    ) -> Iterator[Prediction]:
        pixels = [each for each in read if not isinstance(each, str)]
        guesses = iter(self._guesses(np.stack(pixels)) if pixels else ())
        for image, each in zip(batch, read, strict=True):
            if isinstance(each, str):
                yield Prediction(image, None, (), each)
            else:
                yield Prediction(image, each, next(guesses), None)

    @torch.inference_mode()
    def _guesses(self, pixels: NDArray[np.uint8]) -> list[tuple[Guess, ...]]:
        images = torch.from_numpy(pixels).to(self._device)
        logits = self._model(normalize(images)).float()
        scores = logits.softmax(1) if self._is_softmax else logits.sigmoid()
        values, labels = scores.topk(self._top_k)
        return [
            tuple(Guess(label, score) for label, score in zip(of_image, its_scores, strict=True))
            for of_image, its_scores in zip(labels.tolist(), values.tolist(), strict=True)
        ]


def crop(payload: bytes, out: NDArray[np.uint8], config: DataConfig) -> None:
    """What an evaluation sees of an image. out: (S, S, 3). Raises `DecodeError`."""
    width, height = image_size(payload)
    [box] = evaluation_boxes(np.array([float(width)]), np.array([float(height)]), config).tolist()
    decode_into(payload, tuple(box), False, out)
