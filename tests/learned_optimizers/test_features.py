import os
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.features import (
    ALPHA,
    BETA,
    GAMMA,
    NETWORKS,
    Features,
    gram,
    load_features,
    smoothness,
    style_transfer_loss,
    targets,
)

RANDOM = "SqueezeNet 1.1 with a fixed random initialisation, no ImageNet weights"
IMAGENET = "SqueezeNet 1.1 with ImageNet weights"
WEIGHT = "features.3.squeeze.weight"
FIRST_WEIGHTS = [-0.306415, -0.313633]


@pytest.fixture(scope="module")
def features():
    return Features("squeezenet1_1").double()


@pytest.fixture(scope="module")
def state():
    from torchvision.models import squeezenet1_1

    return squeezenet1_1(weights=None, num_classes=2).state_dict()


@pytest.fixture(autouse=True)
def checkpoints(tmp_path, monkeypatch):
    """The hub's cache, empty; no download."""

    def fail(*_, **__):
        raise OSError("no network in a test")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def holds(features, state):
    return all(torch.equal(value, state[key]) for key, value in features.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_feature_maps_are_what_the_layers_of_torchvision_give(name):
    features, network = Features(name), NETWORKS[name]
    assert {*network.content, *network.style} == set(network.layers)
    x = pictures(2, 3, 64, 64).float()
    maps = features(x)
    assert list(maps) == list(network.layers)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    y = ((x.movedim(1, -1) - mean) / std).movedim(-1, 1)
    last = max(network.layers.values())
    assert len(features.features) == last + 1
    for index, layer in enumerate(features.features):
        y = layer(y.clone())
        for key in [key for key, value in network.layers.items() if value == index]:
            torch.testing.assert_close(maps[key], y)
            assert maps[key].shape[2:].numel() >= 16
            assert (maps[key] >= 0).all()  # behind a ReLU, and not overwritten
            assert 0.3 < maps[key].square().mean() < 10  # the scale is kept
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not any(module.training or getattr(module, "inplace", False) for module in features.modules())


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_layers_of_vgg_are_called_as_in_its_paper(name):
    names, block, number = {}, 1, 0
    for index, layer in enumerate(Features(name).features):
        if isinstance(layer, nn.MaxPool2d):
            block, number = block + 1, 0
        elif isinstance(layer, nn.ReLU):
            number += 1
            names[f"relu{block}_{number}"] = index
    assert NETWORKS[name].layers.items() <= names.items()


def test_random_weights_are_fixed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = Features("squeezenet1_1"), Features("squeezenet1_1")
    assert torch.equal(torch.get_rng_state(), before)
    assert holds(first, second.state_dict())
    # the same on every machine
    assert first.features[0].weight.flatten()[:2].tolist() == pytest.approx(FIRST_WEIGHTS, abs=1e-6)
    assert WEIGHT in first.state_dict()
    assert not any(key in first.state_dict() for key in ("mean", "std"))


def test_features_stay_precise_under_autocast(features):
    x = pictures(1, 3, 64, 64).float()
    single = Features("squeezenet1_1")
    plain = targets(single, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = targets(single, x, x)
    torch.testing.assert_close(rounded, plain, rtol=0, atol=0)


@pytest.mark.parametrize("x", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64).byte()])
def test_features_refuse_what_is_no_rgb_picture(x):
    with pytest.raises(ValueError, match=r"expected float images \(B, 3, H, W\), got torch"):
        Features("squeezenet1_1")(x)


def test_gram_is_the_sum_of_products_over_places():
    f = pictures(2, 3, 4, 5)
    expected = torch.zeros(2, 3, 3, dtype=f.dtype)
    for b in range(2):
        for c in range(3):
            for d in range(3):
                for i in range(4):
                    for j in range(5):
                        expected[b, c, d] += f[b, c, i, j] * f[b, d, i, j] / 60
    torch.testing.assert_close(gram(f), expected)


def test_smoothness_is_the_squared_difference_of_neighbours():
    x = pictures(2, 3, 4, 5)
    for b in range(2):
        across = [(x[b, c, i, j + 1] - x[b, c, i, j]) ** 2 for c in range(3) for i in range(4) for j in range(4)]
        down = [(x[b, c, i + 1, j] - x[b, c, i, j]) ** 2 for c in range(3) for i in range(3) for j in range(5)]
        torch.testing.assert_close(smoothness(x)[b], sum(across) / len(across) + sum(down) / len(down))


def test_style_transfer_loss_is_the_weighted_sum_of_its_terms(features):
    x, content, style = pictures(2, 3, 64, 64), pictures(2, 3, 64, 64).flip(3), pictures(1, 3, 48, 72)
    loss = style_transfer_loss(features, x, *targets(features, content, style), alpha=2, beta=3, gamma=5)
    assert loss.shape == (2,)
    of_style = {name: gram(value)[0] for name, value in features(style).items()}
    for b in range(2):
        mine, theirs = features(x[b : b + 1]), features(content[b : b + 1])
        expected = 5 * smoothness(x[b : b + 1])[0]
        for name in ("fire3",):
            a, t = mine[name].flatten().tolist(), theirs[name].flatten().tolist()
            expected += 2 * sum((p - q) ** 2 for p, q in zip(a, t, strict=True)) / sum(q**2 for q in t)
        for name in ("relu1", "fire2", "fire3", "fire4", "fire5"):
            a, t = gram(mine[name])[0], of_style[name]
            expected += 3 / 5 * (a - t).pow(2).sum() / t.pow(2).sum()
        torch.testing.assert_close(loss[b], expected)


def test_the_terms_are_0_for_their_targets_and_1_for_empty_features(features):
    content, style = pictures(1, 3, 64, 64), pictures(1, 3, 80, 64)
    goals = targets(features, content, style)
    assert style_transfer_loss(features, content, *goals, 1, 0, 0).item() == 0
    assert style_transfer_loss(features, style, *targets(features, style, style), 1, 1, 0).item() == 0
    assert style_transfer_loss(features, content, *goals, 0, 1, 0).item() > 0
    flat = features.mean.expand(1, 3, 64, 64)  # no biases here: 0 everywhere
    assert style_transfer_loss(features, flat, *goals, 1, 0, 0).item() == pytest.approx(1)
    assert style_transfer_loss(features, flat, *goals, 0, 1, 0).item() == pytest.approx(1)
    assert style_transfer_loss(features, flat, *targets(features, flat, flat)).item() == 0  # not 0 / 0
    default = style_transfer_loss(features, content, *goals)
    assert default.item() == style_transfer_loss(features, content, *goals, ALPHA, BETA, GAMMA).item()


def test_a_batch_gives_what_its_pictures_give_one_at_a_time(features):
    x, content, style = pictures(3, 3, 64, 64), pictures(3, 3, 64, 64).flip(2), pictures(3, 3, 64, 66)
    for styles in (style, style[:1]):
        loss = style_transfer_loss(features, x, *targets(features, content, styles))
        for b in range(3):
            one, s = slice(b, b + 1), slice(0, 1) if len(styles) == 1 else slice(b, b + 1)
            alone = style_transfer_loss(features, x[one], *targets(features, content[one], styles[s]))
            torch.testing.assert_close(alone, loss[one])


def test_gradients_reach_every_pixel_and_can_be_differentiated(features):
    content, style = pictures(1, 3, 64, 64), pictures(1, 3, 64, 64).flip(3)
    goals = targets(features, content, style)
    x = pictures(1, 3, 64, 64).flip(2).requires_grad_()
    assert not any(goal.requires_grad for part in targets(features, x, x) for goal in part.values())
    direction = pictures(1, 3, 64, 64).flip(1) - 0.5

    def loss_at(step):
        return style_transfer_loss(features, x.detach() + step * direction, *goals).item()

    (gradient,) = torch.autograd.grad(style_transfer_loss(features, x, *goals).sum(), x, create_graph=True)
    assert (gradient != 0).all()  # the last row and column too, which only the smoothness sees
    slope = (gradient * direction).sum()
    # so small a step that no ReLU switches on or off in between
    assert slope.item() == pytest.approx((loss_at(1e-8) - loss_at(-1e-8)) / 2e-8, rel=1e-4)
    (second,) = torch.autograd.grad(slope, x)
    assert second.isfinite().all()
    assert second.abs().max() > 0
    # an optimizer gets down
    start = loss_at(0)
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        style_transfer_loss(features, x, *goals).sum().backward()
        optimizer.step()
    assert loss_at(0) < 0.9 * start
    assert all(parameter.grad is None for parameter in features.parameters())


def test_pictures_of_another_size_than_the_content_are_refused(features):
    goals = targets(features, pictures(1, 3, 64, 64), pictures(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"expected fire3 of shape \(128, 15, 15\).*content's size"):
        style_transfer_loss(features, pictures(1, 3, 64, 96), *goals)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("part", ["whole", "features", "inner"])
def test_loads_a_named_file_of_the_model_or_its_features(tmp_path, state, suffix, part):
    contents = {
        "whole": state,
        "features": {key: value for key, value in state.items() if key.startswith("features.")},
        "inner": {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")},
    }[part]
    path = tmp_path / f"mine.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(contents, path)
    before = torch.get_rng_state()
    features, sentence = load_features("squeezenet1_1", tmp_path / "none", str(path), download=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert sentence == f"SqueezeNet 1.1 with the weights of mine.{suffix}"
    assert holds(features, state)
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_looks_in_the_data_folder_then_in_the_cache(tmp_path, checkpoints, state):
    folder = tmp_path / "weights"
    folder.mkdir()
    wrong = {"features.0.weight": torch.zeros(1)}
    assert load_features("squeezenet1_1", tmp_path, download=False)[1] == RANDOM
    torch.save(wrong, folder / "squeezenet1_1_bn-1234.pth")  # another network, named alike
    torch.save(wrong, checkpoints / "squeezenet1_1_bn-1234.pth")
    assert load_features("squeezenet1_1", tmp_path)[1] == RANDOM
    # each place goes before those above
    for path in (
        checkpoints / "squeezenet1_1-b8a52dc0.pth",
        folder / "squeezenet1_1-b8a52dc0.pth",
        folder / "squeezenet1_1.pth",
        folder / "squeezenet1_1.safetensors",
    ):
        marked = {**state, WEIGHT: torch.full_like(state[WEIGHT], len(str(path)))}
        (save_file if path.suffix == ".safetensors" else torch.save)(marked, path)
        features, sentence = load_features("squeezenet1_1", str(tmp_path))
        assert sentence == f"{IMAGENET} ({path.name})"
        assert holds(features, marked)


class Server:
    """Stands for the download: writes this state dict, or fails."""

    def __init__(self, state=None, error=None):
        self.state, self.error, self.timeout = state, error, None

    def __call__(self, url, path, hash_prefix, progress):
        assert hash_prefix
        assert not progress
        self.timeout = socket.getdefaulttimeout()
        print("100%|####|")
        print("100%|####|", file=sys.stderr)
        if self.error:
            raise self.error
        torch.save(self.state, path)


def test_downloads_quietly_under_a_timeout_and_only_where_it_may(tmp_path, monkeypatch, capfd, state):
    server = Server(state)
    monkeypatch.setattr("torch.hub.download_url_to_file", server)
    before = socket.getdefaulttimeout()
    assert load_features("squeezenet1_1", tmp_path, download=False)[1] == RANDOM
    assert server.timeout is None
    features, sentence = load_features("squeezenet1_1", tmp_path)
    assert sentence == f"{IMAGENET} (squeezenet1_1-b8a52dc0.pth)"
    assert holds(features, state)
    assert server.timeout == 10
    assert socket.getdefaulttimeout() == before
    assert capfd.readouterr() == ("", "")
    server.error = OSError("asked again")
    assert load_features("squeezenet1_1", tmp_path)[1] == sentence  # from the cache


@pytest.mark.parametrize(
    "server",
    [
        Server(error=TimeoutError("timed out")),
        Server(error=RuntimeError("invalid hash value")),
        Server({"features.0.weight": torch.zeros(1)}),
    ],
    ids=["timeout", "hash", "another network"],
)
def test_a_failed_download_falls_back_to_random_weights(tmp_path, monkeypatch, server):
    monkeypatch.setattr("torch.hub.download_url_to_file", server)
    before = socket.getdefaulttimeout()
    features, sentence = load_features("squeezenet1_1", tmp_path)
    assert sentence == RANDOM
    assert holds(features, Features("squeezenet1_1").state_dict())
    assert socket.getdefaulttimeout() == before


def refused(path, *words, weights=True):
    with pytest.raises(InputError) as caught:
        load_features("squeezenet1_1", path.parents[1], str(path) if weights else None, download=False)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def test_refuses_a_network_it_does_not_know(tmp_path):
    with pytest.raises(InputError, match=r"no network 'vgg11' .*: choose one of squeezenet1_1, vgg16, vgg19"):
        load_features("vgg11", tmp_path)


def test_refuses_a_missing_file_and_a_folder(tmp_path):
    refused(tmp_path / "none.pth", "no such file")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", "half"], ids=["empty", "text", "truncated"])
def test_refuses_a_corrupt_file_wherever_it_lies(tmp_path, state, suffix, content):
    path = tmp_path / "weights" / f"squeezenet1_1.{suffix}"
    path.parent.mkdir()
    if content == "half":
        (save_file if suffix == "safetensors" else torch.save)(state, path)
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(content)
    refused(path, "cannot be read as weights")
    refused(path, "cannot be read as weights", weights=False)


def test_runs_no_code_from_a_file(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(nn.Linear(1, 1), path)
    refused(path, "cannot be read as weights")


@pytest.mark.parametrize("contents", [[1, 2], {"epoch": 3}, torch.zeros(2)], ids=["list", "numbers", "tensor"])
def test_refuses_what_is_no_state_dict(tmp_path, contents):
    path = tmp_path / "other.pth"
    torch.save(contents, path)
    refused(path, "not a state dict", "save model.state_dict()")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({WEIGHT: None}, ("has no tensor features.3.squeeze.weight",)),
        ({WEIGHT: torch.zeros(16, 96, 1, 1)}, (WEIGHT, "float32 16x96x1x1", "float32 16x64x1x1")),
        ({WEIGHT: torch.zeros(16, 64, 1, 1, dtype=torch.int64)}, (WEIGHT, "int64 16x64x1x1")),
        ({WEIGHT: torch.tensor(0.0)}, (WEIGHT, "float32 scalar")),
    ],
    ids=["missing", "shape", "integers", "scalar"],
)
def test_refuses_another_architecture_by_its_first_tensor(tmp_path, state, change, words):
    path = tmp_path / "other.pth"
    torch.save({key: value for key, value in (state | change).items() if value is not None}, path)
    refused(path, *words, "SqueezeNet 1.1", "give torchvision's weights of squeezenet1_1")


def test_refuses_the_weights_of_one_vgg_for_the_other(tmp_path):
    for name, other in (("vgg16", "vgg19"), ("vgg19", "vgg16")):
        path = tmp_path / f"{name}.pth"
        torch.save(Features(name).state_dict(), path)
        with pytest.raises(InputError, match=f"features.*: give torchvision's weights of {other}"):
            load_features(other, tmp_path, str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_refuses_values_that_are_not_finite(tmp_path, state, value):
    path = tmp_path / "broken.pth"
    torch.save(state | {WEIGHT: torch.full(state[WEIGHT].shape, value, dtype=torch.float64)}, path)
    refused(path, WEIGHT, "not finite")


def test_real_weights(real_data):
    features, sentence = load_features("squeezenet1_1", real_data, download=False)
    assert sentence == f"{IMAGENET} (squeezenet1_1.safetensors)"
    x = pictures(1, 3, 64, 64).float()
    maps = features(x)
    assert all(value.isfinite().all() for value in maps.values())
    assert all((value > 0).any() for value in maps.values())
    goals = targets(features, x, x.flip(3))
    assert style_transfer_loss(features, x, *goals, alpha=1, beta=0, gamma=0).item() == 0
    assert 0.1 < style_transfer_loss(features, torch.full_like(x, 0.5), *goals).item() < 10
