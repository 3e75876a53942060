"""Converting weights from the command line: Keras' logits come out, in both directions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import convert_weights
import numpy as np
import pytest
import safetensors.torch
import torch
from convert_weights import ConvertConfig
from numpy.typing import NDArray
from torch import Tensor, nn

from datapipe.position import Position
from xdist import checkpoint
from xdist.checkpoint import Cut, Manifest
from xdist.flat import FlatModel
from xdist.model_config import ModelConfig
from xdist.models import build_model
from xdist.models.inception_v3 import InceptionV3
from xdist.models.xception import Xception
from xdist.naming import TIMM, XDIST, namings
from xdist.weight_files import read_file, write
from xdist.weights import Fitted

h5py = pytest.importorskip("h5py", reason="needs h5py: pip install '.[dev]'")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(  # of numpy, about how Keras reads a tensor of torch
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
NARROW = ModelConfig(num_classes=5, width=0.1, middle_modules=1)
NUM_CLASSES = 100
TOLERANCE = 1e-4
"""Of logits up to 10: the two programs add the same products in another order."""
Images = NDArray[np.float32]


def convert(*arguments: object) -> int:
    return convert_weights.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as environment:  # Keras reads it once, on import
        environment.setenv("KERAS_BACKEND", "torch")
        environment.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        yield pytest.importorskip("keras", reason="needs keras: pip install '.[dev]'")


def keras_network(keras: Any, name: str, *, gain: float, size: int = 299) -> Any:
    """A network of Keras Applications with random weights and moving statistics, at which `gain`
    keeps activations around 1.
    """
    keras.layers.Conv2D(1, 1)  # so that conv2d is not the network's first
    network = getattr(keras.applications, name)(
        weights=None, classes=NUM_CLASSES, classifier_activation=None, input_shape=(size, size, 3)
    )
    generator = np.random.default_rng(0)
    for weight in network.weights:
        inputs = weight.shape[:2] if "depthwise" in weight.path else weight.shape[:-1]
        spread = gain / np.sqrt(np.prod(inputs)) if inputs else 0.1
        values = generator.normal(0, spread, weight.shape)
        if weight.path.endswith(("gamma", "moving_variance")):
            values = generator.uniform(0.5, 1.5, weight.shape)
        weight.assign(values.astype(np.float32))
    return network


def make_images(size: int) -> Images:
    """Two images of coloured squares, one faint and one strong: (2, size, size, 3) in [-1, 1]."""
    colours = np.random.default_rng(1).uniform(-1, 1, (2, 25, 25, 3))
    colours[0] /= 4
    squares = np.kron(colours, np.ones((1, 13, 13, 1)))
    return squares[:, :size, :size].astype(np.float32)


def keras_logits(network: Any, images: Images) -> Images:
    with torch.no_grad():
        logits: Images = network(images, training=False).numpy()
    return logits


def our_logits(network: nn.Module, images: Images) -> Images:
    with torch.no_grad():
        logits: Tensor = network.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))
    return logits.numpy()


def assert_same_logits(found: Images, expected: Images) -> None:
    assert np.abs(expected[0] - expected[1]).max() > 0.1  # they depend on the images
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def keras_xception(keras: Any) -> Any:
    return keras_network(keras, "Xception", gain=1.0)


@pytest.fixture(scope="module")
def keras_inception_v3(keras: Any) -> Any:
    return keras_network(keras, "InceptionV3", gain=1.4)


@pytest.fixture(scope="module")
def xception(keras_xception: Any, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Keras' network, imported."""
    directory = tmp_path_factory.mktemp("xception")
    keras_xception.save_weights(directory / "keras.weights.h5")
    assert convert(directory / "keras.weights.h5", directory / "ours.safetensors") == 0
    network = Xception(num_classes=NUM_CLASSES)
    network.load_state_dict(safetensors.torch.load_file(directory / "ours.safetensors"))
    return network


@pytest.fixture(scope="module")
def inception_v3(keras_inception_v3: Any, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Keras' network, imported."""
    directory = tmp_path_factory.mktemp("inception_v3")
    keras_inception_v3.save_weights(directory / "keras.weights.h5")
    assert convert(directory / "keras.weights.h5", directory / "ours.pt") == 0
    network = InceptionV3(num_classes=NUM_CLASSES)
    network.load_state_dict(torch.load(directory / "ours.pt", weights_only=True))
    return network


@pytest.mark.slow
@pytest.mark.parametrize("size", [299, 150])
def test_xception_of_keras_has_the_same_logits_here(
    keras: Any, keras_xception: Any, xception: nn.Module, size: int
) -> None:
    theirs = keras_xception
    if size != 299:
        theirs = keras_network(keras, "Xception", gain=1.0, size=size)
        theirs.set_weights(keras_xception.get_weights())
    images = make_images(size)
    assert_same_logits(our_logits(xception, images), keras_logits(theirs, images))


@pytest.mark.slow
def test_inception_v3_of_keras_has_the_same_logits_here(
    keras_inception_v3: Any, inception_v3: nn.Module
) -> None:
    images = make_images(299)
    assert_same_logits(our_logits(inception_v3, images), keras_logits(keras_inception_v3, images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xception", "inception_v3"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_every_file_of_keras_gives_the_same_weights(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    theirs, ours = request.getfixturevalue(f"keras_{name}"), request.getfixturevalue(name)
    theirs.save(tmp_path / "keras.keras")
    theirs.save(tmp_path / "keras.h5")
    with h5py.File(tmp_path / "keras.h5") as whole, h5py.File(tmp_path / "list.h5", "w") as weights:
        for layer in whole["model_weights"].values():  # as the published files are
            whole.copy(layer, weights)
        weights.attrs.update(whole["model_weights"].attrs)
    expected = ours.state_dict()
    for file in ("keras.keras", "keras.h5", "list.h5"):
        found = read_file(str(tmp_path / file), model=None).network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "gain"), [("xception", "Xception", 1.0), ("inception_v3", "InceptionV3", 1.4)]
)
def test_our_network_has_the_same_logits_in_keras(
    keras: Any, tmp_path: Path, model: str, name: str, gain: float
) -> None:
    ours = random_network(ModelConfig(name=model, num_classes=NUM_CLASSES), gain=gain)
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    assert convert(tmp_path / "ours.pt", tmp_path / "keras.weights.h5") == 0
    theirs = keras_network(keras, name, gain=gain)
    theirs.load_weights(tmp_path / "keras.weights.h5")
    images = make_images(299)
    assert_same_logits(keras_logits(theirs, images), our_logits(ours, images))


def random_network(model: ModelConfig, *, gain: float = 1.0) -> nn.Module:
    """Random weights and batch-norm statistics."""
    assert model.num_classes is not None
    network = build_model(model, num_classes=model.num_classes, head_bias=0.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(gain)
        elif isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            for name, vector in state.items():
                if name in ("weight", "running_var"):
                    vector.uniform_(0.5, 1.5, generator=generator)
                elif vector.ndim:
                    vector.normal_(0, 0.1, generator=generator)
    return network.eval()


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A file of a narrow network's weights, which says what network that is."""
    network = random_network(NARROW)
    write(str(tmp_path / "narrow.safetensors"), Fitted(NARROW, network, XDIST), image_size=32)
    return tmp_path / "narrow.safetensors"


def onnx_logits(path: Path, images: Images) -> Images:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[dev]'")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits: Images
    (logits,) = session.run(["logits"], {"images": images.transpose(0, 3, 1, 2)})
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gain"),
    [("xception", 1.0), pytest.param("inception_v3", 1.4, marks=pytest.mark.long)],
)
def test_a_network_of_onnx_has_the_same_logits_for_any_number_of_images(
    tmp_path: Path, name: str, gain: float
) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install '.[onnx]'")
    model = ModelConfig(name=name, num_classes=5, width=0.25)
    network = random_network(model, gain=gain)
    source = tmp_path / "ours.safetensors"
    write(str(source), Fitted(model, network, XDIST), image_size=96)
    assert convert(source, tmp_path / "ours.onnx", "--image-size", 96) == 0
    images = make_images(96)
    expected = our_logits(network, images)
    assert_same_logits(onnx_logits(tmp_path / "ours.onnx", images), expected)
    first, second = (onnx_logits(tmp_path / "ours.onnx", images[i : i + 1]) for i in range(2))
    assert_same_logits(np.concatenate([first, second]), expected)


def test_a_run_becomes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = FlatModel(random_network(NARROW))
    checkpoint.make_directory(str(tmp_path / "run"))
    url = checkpoint.checkpoint_url(str(tmp_path / "run"), 7)
    size = flat.layout.num_weights
    parts = (
        checkpoint.write_range(url, {"weights": flat.weights}, start=0, stop=size),
        checkpoint.write_statistics(url, {"statistics": flat.statistics}),
    )
    cut = Cut(7, 70, Position(), is_final=True)
    config = {"model": asdict(NARROW)}
    manifest = Manifest(cut, flat.layout, parts, {}, config, checkpoint.versions())
    checkpoint.publish(url, manifest)
    assert convert(tmp_path / "run", tmp_path / "out" / "a.pt", "--weights", "raw") == 0
    assert "5 classes, named as in xdist) to " in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "a.pt", weights_only=True)
    expected = flat.model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_weights_of_timm_come_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = random_network(NARROW)
    state = network.state_dict()
    names = namings(network)[TIMM]
    torch.save({name: state[place.name] for name, place in names.items()}, tmp_path / "timm.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model": asdict(NARROW)}))
    model = ("--model", tmp_path / "config.json")
    assert convert(tmp_path / "timm.pth", tmp_path / "a.safetensors", *model) == 0
    said = capsys.readouterr()
    assert "named as in timm's legacy_xception" in said.out
    assert "note: timm's legacy_xception has batch-norm epsilon 1e-5" in said.err


def mistake_missing(narrow: Path) -> list[object]:
    return [narrow.parent / "nothing.h5", narrow.parent / "a.pt"]


def mistake_directory(narrow: Path) -> list[object]:
    return [narrow.parent, narrow.parent / "a.pt"]


def mistake_network(narrow: Path) -> list[object]:
    torch.save({"layer.weight": torch.zeros(1)}, narrow.parent / "other.pt")
    return [narrow.parent / "other.pt", narrow.parent / "a.pt"]


def mistake_name(narrow: Path) -> list[object]:
    return [narrow, narrow.parent / "a.pt", "--model", "alexnet"]


def mistake_width(narrow: Path) -> list[object]:
    return [narrow, narrow.parent / "a.pt", "--model", "xception"]


def mistake_size(narrow: Path) -> list[object]:
    return [narrow, narrow.parent / "a.onnx", "--image-size", 3]


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (mistake_missing, "No such file or directory"),
        (mistake_directory, "neither a checkpoint nor a run"),
        (mistake_network, "holds weights of none of these: xception (xdist), "),
        (mistake_name, "model.name is 'alexnet'; allowed: one of xception, "),
        (mistake_width, "stem.0.weight has shape (8, 3, 3, 3), needed is (32, 3, 3, 3), "),
        (mistake_size, "images of 3 px do not go through the network"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    narrow: Path,
    mistake: Callable[[Path], list[object]],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = mistake(narrow)
    assert convert(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert text in errors[0]
    assert not list(narrow.parent.glob("a.*"))


@pytest.mark.parametrize(
    ("source", "target", "options", "text"),
    [
        ("a.h5", "a.tflite", {}, "allowed endings: .safetensors, .pt, .onnx, .weights.h5"),
        ("a.h5", "a.h5", {}, "allowed endings"),
        ("a.h5", "a.pt", {"weights": "raw"}, "allowed: only with a checkpoint"),
        ("run", "a.pt", {"model": "xception"}, "allowed: only with a file"),
        ("a.h5", "a.pt", {"image_size": 99}, "allowed: only with .onnx"),
        ("a.h5", "a.onnx", {"image_size": 0}, "allowed: at least 1"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    source: str, target: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        ConvertConfig(source, target, **options)


@pytest.mark.slow
def test_the_real_command_line(narrow: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "jobs/convert_weights.py", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    done = run(narrow, narrow.parent / "a.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("converted xception (")
    wrong = run(narrow.parent / "nothing.h5", narrow.parent / "a.pt")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr
