"""Files of weights: every format comes back, and nothing that does not fit is taken over."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from datapipe.position import Position
from xdist import checkpoint
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.errors import CheckpointDamaged, UserError
from xdist.flat import FlatModel
from xdist.model_config import ModelConfig
from xdist.models import build_model
from xdist.naming import KERAS, TIMM, XDIST, namings
from xdist.weight_files import read_checkpoint, read_file, write
from xdist.weights import Fitted

h5py = pytest.importorskip("h5py", reason="needs h5py: pip install '.[dev]'")

NARROW = ModelConfig(num_classes=5, width=0.1, middle_modules=1)
State = dict[str, Tensor]


def network(seed: int = 0, model: ModelConfig = NARROW) -> nn.Module:
    """Random weights, batch-norm statistics and all."""
    assert model.num_classes is not None
    built = build_model(model, num_classes=model.num_classes, head_bias=0.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in built.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.5
            tensor.uniform_(low, low + 1, generator=generator)
    return built.eval()


def weights(built: nn.Module) -> State:
    return {name: tensor for name, tensor in built.state_dict().items() if tensor.ndim}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def read(path: Path, options: Path | None = None) -> Fitted:
    return read_file(str(path), model=str(options) if options else None)


@pytest.fixture
def options(tmp_path: Path) -> Path:
    """The config.json of a run of the narrow network."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": asdict(NARROW)}))
    return path


@pytest.mark.parametrize(
    ("name", "style"),
    [("a.safetensors", XDIST), ("a.pt", XDIST), ("a.weights.h5", KERAS)],
)
def test_what_was_written_comes_back(tmp_path: Path, options: Path, name: str, style: str) -> None:
    built = network()
    write(str(tmp_path / name), Fitted(NARROW, built, XDIST), image_size=32)
    found = read(tmp_path / name, options)
    assert (found.model, found.style) == (NARROW, style)
    assert same(weights(found.network), weights(built))
    assert not found.network.training


def test_safetensors_say_what_network_they_are_of(tmp_path: Path) -> None:
    model = ModelConfig(num_classes=5, width=0.1, middle_modules=0, fc=(8,), mid_activation="elu")
    built = network(model=model)
    write(str(tmp_path / "a.safetensors"), Fitted(model, built, XDIST), image_size=32)
    found = read(tmp_path / "a.safetensors")
    assert found.model == model
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(found.network(images), built(images))


def test_a_plain_state_dict_is_what_torch_loads(tmp_path: Path) -> None:
    built = network()
    write(str(tmp_path / "a.pt"), Fitted(NARROW, built, XDIST), image_size=32)
    other = network(seed=1)
    other.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert same(weights(other), weights(built))


def in_timm_names(built: nn.Module) -> State:
    state = built.state_dict()
    return {name: state[place.name] for name, place in namings(built)[TIMM].items()}


def test_a_state_dict_of_timm(tmp_path: Path, options: Path) -> None:
    built = network()
    state = in_timm_names(built) | {"bn1.num_batches_tracked": torch.tensor(7)}
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "training.pth")
    for name in ("a.pth", "a.safetensors", "training.pth"):
        found = read(tmp_path / name, options)
        assert found.style == TIMM
        assert same(weights(found.network), weights(built))


def test_a_state_dict_of_pretrainedmodels(tmp_path: Path, options: Path) -> None:
    """Its classifier is `last_linear`, its pointwise kernels are (out, in)."""
    built = network()
    state = {
        name.replace("fc.", "last_linear."): tensor[:, :, 0, 0] if "pointwise" in name else tensor
        for name, tensor in in_timm_names(built).items()
    }
    torch.save(state, tmp_path / "a.pth")
    assert same(weights(read(tmp_path / "a.pth", options).network), weights(built))


def test_half_precision_becomes_float32(tmp_path: Path, options: Path) -> None:
    built = network().half()
    torch.save(built.state_dict(), tmp_path / "a.pt")
    found = weights(read(tmp_path / "a.pt", options).network)
    assert same(found, {name: tensor.float() for name, tensor in weights(built).items()})


@pytest.mark.parametrize("file", ["whole.h5", "weights.h5", "tensorflow-2.13.weights.h5"])
def test_other_layouts_of_keras(tmp_path: Path, options: Path, file: str) -> None:
    built = network()
    path, other = tmp_path / "a.weights.h5", tmp_path / file
    write(str(path), Fitted(NARROW, built, XDIST), image_size=32)
    with h5py.File(path) as source, h5py.File(other, "w") as target:
        if file == "tensorflow-2.13.weights.h5":
            source.copy("layers", target, "_layer_checkpoint_dependencies")
        else:
            list_layers(source, target.create_group("model_weights") if "whole" in file else target)
    assert same(weights(read(other, options).network), weights(built))


def list_layers(source: Any, group: Any) -> None:
    """The layout of Keras 2: byte strings, numbers that begin anywhere, nested names."""
    names = []
    for number, layer in enumerate(sorted(source["layers"], key=place_in_graph), start=71):
        names.append(f"layer_{number}".encode())
        there = group.create_group(names[-1])
        variables = source[f"layers/{layer}/vars"]
        inside = [f"layer_{number}/weight_{i}:0".encode() for i in variables]
        for name, variable in zip(inside, variables.values(), strict=True):
            there[name] = variable[()]
        there.attrs["weight_names"] = inside
    group.create_group("activation").attrs["weight_names"] = []
    group.attrs["layer_names"] = [*names, b"activation"]


def place_in_graph(layer: str) -> int:
    number = layer.rpartition("_")[2]
    return int(number) if number.isdigit() else 0


def set_weight(file: Any, name: str, *shape: int) -> None:
    file.pop(name, None)
    file[name] = torch.zeros(shape).numpy()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda file: set_weight(file, "layers/conv2d_1/vars/0", 3, 3, 8, 16),
            "layers/conv2d_1/vars/0 (stem.3.weight) has shape (3, 3, 8, 16), "
            "needed is (3, 3, 8, 8)",
        ),
        (
            lambda file: set_weight(file, "layers/dense/vars/0", 5, 208),
            "layers/dense/vars/0 (classifier.weight) has shape (5, 208), needed is (208, 5)",
        ),
        (
            lambda file: file.pop("layers/dense"),
            "missing layers/dense/vars/0 (classifier.weight), "
            "layers/dense/vars/1 (classifier.bias)",
        ),
        (
            lambda file: file.pop("layers/batch_normalization_7/vars/1"),
            "missing layers/batch_normalization_7/vars/1 (entry_flow.1.skip.1.bias)",
        ),
        (
            lambda file: set_weight(file, "layers/conv2d_9/vars/0", 1),
            "surplus layers/conv2d_9/vars/0",
        ),
    ],
    ids=["shape", "transposed", "no classifier", "missing", "surplus"],
)
def test_a_file_of_keras_that_does_not_fit(
    tmp_path: Path, options: Path, change: Callable[[Any], None], problem: str
) -> None:
    path = tmp_path / "a.weights.h5"
    write(str(path), Fitted(NARROW, network(), XDIST), image_size=32)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(UserError) as caught:
        read(path, options)
    assert problem in str(caught.value)
    assert "nothing converted" in str(caught.value)


def test_all_that_does_not_fit_is_in_one_message(tmp_path: Path, options: Path) -> None:
    state = in_timm_names(network())
    state["conv2.weight"] = torch.zeros(8, 8, 1, 1)
    state["extra"] = state.pop("bn4.bias")
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.pth", options)
    assert str(caught.value) == (
        f"{tmp_path}/a.pth: nothing converted, as it does not fit xception with 5 classes in the "
        "naming of timm's legacy_xception: conv2.weight (stem.3.weight) has shape (8, 8, 1, 1), "
        "needed is (8, 8, 3, 3); missing bn4.bias (exit_flow.3.norm.bias); surplus extra; where "
        "the options of the network are not the paper's, give --model the config.json of its run"
    )


def test_long_lists_are_cut(tmp_path: Path, options: Path) -> None:
    state = network(model=ModelConfig(num_classes=5, width=0.1, middle_modules=3)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"surplus middle_flow\.1\..* and 26 more; where the"):
        read(tmp_path / "a.pt", options)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.weights.h5"])
@pytest.mark.parametrize(
    "damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_text("no")]
)
def test_a_damaged_file_is_named(
    tmp_path: Path, options: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    write(str(path), Fitted(NARROW, network(), XDIST), image_size=32)
    damage(path)
    with pytest.raises(UserError, match=f"{path}: not readable as"):
        read(path, options)


def test_an_archive_of_keras_without_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UserError, match=r"no item named 'model\.weights\.h5' in the archive"):
        read(tmp_path / "a.keras")


def test_an_h5_of_something_else(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = [1, 2, 3]
    with pytest.raises(UserError, match=r"it holds \['images'\], neither layers nor their names"):
        read(tmp_path / "a.h5")


class Code:
    """Pickles as a call, which must not happen."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("pickled-code-was-run",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(UserError, match="not readable as a state_dict"):
        read(tmp_path / "a.pt")
    assert not (tmp_path / "pickled-code-was-run").exists()


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, {"state_dict": {"conv1.weight": [1.0]}}])
def test_a_pickle_that_is_no_state_dict(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no state_dict"):
        read(tmp_path / "a.pt")


def test_weights_of_an_unknown_network(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds weights of none of these: xception \(xdist\)"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not the config.json of a run"),
        ("{}", "not the config.json of a run"),
        ('{"model": {"fc": [], "color": 3}}', "not the options of a network"),
    ],
)
def test_options_that_cannot_be_read(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    torch.save(network().state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=reason):
        read(tmp_path / "a.pt", tmp_path / "config.json")


def save_checkpoint(run_dir: Path, *, step: int, with_average: bool = True) -> Checkpoint:
    """Of two networks: seed 0 is raw, seed 1 the average."""
    checkpoint.make_directory(str(run_dir))
    url = checkpoint.checkpoint_url(str(run_dir), step)
    raw, average = FlatModel(network(seed=0)), FlatModel(network(seed=1))
    tensors, statistics = {"weights": raw.weights}, {"statistics": raw.statistics}
    if with_average:
        tensors["average"], statistics["statistics_average"] = average.weights, average.statistics
    middle, size = 1000, raw.layout.num_weights
    parts = [
        checkpoint.write_range(
            url, {name: tensor[start:stop] for name, tensor in tensors.items()},
            start=start, stop=stop,
        )
        for start, stop in ((0, middle), (middle, size))
    ]  # fmt: skip
    parts.append(checkpoint.write_statistics(url, statistics))
    config = {"model": asdict(replace(NARROW, num_classes=None))}
    cut = Cut(step, 10 * step, Position(), is_final=False)
    manifest = Manifest(cut, raw.layout, tuple(parts), {}, config, checkpoint.versions())
    return checkpoint.publish(url, manifest)


@pytest.mark.parametrize(("wanted", "seed"), [("raw", 0), ("average", 1), (None, 1)])
def test_a_checkpoint_has_raw_and_averaged_weights(
    tmp_path: Path, wanted: Literal["average", "raw"] | None, seed: int
) -> None:
    saved = save_checkpoint(tmp_path, step=3)
    for url in (saved.url, str(tmp_path)):
        found = read_checkpoint(url, weights=wanted)
        assert found.model == NARROW
        assert same(weights(found.network), weights(network(seed=seed)))


def test_a_checkpoint_without_average_gives_raw_weights(tmp_path: Path) -> None:
    url = save_checkpoint(tmp_path, step=3, with_average=False).url
    assert same(weights(read_checkpoint(url, weights=None).network), weights(network(seed=0)))
    with pytest.raises(UserError, match="kept no average of the weights"):
        read_checkpoint(url, weights="average")


def test_a_damaged_checkpoint_is_refused_and_a_run_gives_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=3)
    damaged = save_checkpoint(tmp_path, step=4)
    truncate(Path(damaged.url, damaged.manifest.parts[0].file))
    with pytest.raises(CheckpointDamaged, match="which are not"):
        read_checkpoint(damaged.url, weights=None)
    assert read_checkpoint(str(tmp_path), weights=None).model == NARROW


def test_a_run_without_checkpoint_and_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        read_checkpoint(f"{tmp_path}/run", weights=None)
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        read_checkpoint(str(tmp_path), weights=None)


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    model = replace(NARROW, segments=3)
    target = tmp_path / "a.weights.h5"
    target.write_text("before")
    with pytest.raises(
        UserError, match="cannot hold this xception; allowed: xception of depthwise"
    ):
        write(str(target), Fitted(model, network(model=model), XDIST), image_size=32)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
