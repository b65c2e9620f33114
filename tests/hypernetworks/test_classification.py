import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.classification import PictureClassification, linear_classifier
from lightning_meta.hypernetworks.classification_data import CIFAR10DataModule, ImageBatch, MNISTDataModule
from lightning_meta.hypernetworks.figures import answer_sheet, kernel_grid
from lightning_meta.hypernetworks.networks import WideResNet
from lightning_meta.running.segments import Segment

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*no logger configured"),
]
ONE = Segment(0, 0, 1, True)


def trainer_of(folder, **options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        **options,
    )


def batch(count=6, shape=(1, 28, 28)):
    random = torch.Generator().manual_seed(0)
    return ImageBatch(torch.rand(count, *shape, generator=random), torch.arange(count) % 10, ONE)


@pytest.mark.parametrize("hyper", [True, False])
@pytest.mark.parametrize("network", ["digits", "fully_connected"])
def test_the_loss_is_cross_entropy_and_l2_of_the_kernels(network, hyper):
    torch.manual_seed(0)
    model = PictureClassification(network, hyper, l2=0.3)
    model.log = lambda *_, **__: None
    found = model.training_step(batch(), 0).item()
    logits, kernels = model.network(batch().x)
    squares = sum(value**2 for kernel in kernels for value in kernel.flatten().tolist())
    chosen = logits.log_softmax(1)[range(6), range(6)]
    assert found == pytest.approx(-chosen.mean().item() + 0.3 * squares / 2, rel=1e-5)
    model.hparams.l2 = 0.0
    assert model.training_step(batch(), 0).item() == pytest.approx(-chosen.mean().item(), rel=1e-6)


def test_l2_of_a_learned_kernel_is_weight_decay():
    """One step of SGD from the loss term is one with torch's own weight decay on the kernels."""
    after = []
    for l2 in (0.1, 0.0):
        torch.manual_seed(0)
        model = PictureClassification("digits", hyper=False, l2=l2, optimizer="sgd", lr=0.1, lr_steps=[])
        model.log = lambda *_, **__: None
        kernels = [layer.weight for layer in model.network.convolutions]
        others = [p for p in model.parameters() if all(p is not kernel for kernel in kernels)]
        groups = [{"params": kernels, "weight_decay": 0.1 - l2}, {"params": others}]
        optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True)
        for _ in range(3):
            optimizer.zero_grad()
            model.training_step(batch(), 0).backward()
            optimizer.step()
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*after, rtol=1e-5, atol=1e-6)


def rates(model, steps, max_steps=100):
    model._trainer = type("T", (), {"max_steps": max_steps, "optimizers": []})()
    (factor,) = model.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas
    return [model.hparams.lr * factor(step) for step in steps]


def test_rates_of_the_papers_schedules():
    model = PictureClassification(lr=2e-3, lr_steps=[[168_000, 1e-3], [336_000, 2e-4], [504_000, 5e-5]])
    found = rates(model, [0, 167_999, 168_000, 335_999, 336_000, 504_000, 671_999])
    assert found == pytest.approx([2e-3, 2e-3, 1e-3, 1e-3, 2e-4, 5e-5, 5e-5])
    assert rates(PictureClassification(lr=0.1, lr_steps=[]), [0, 10**6]) == pytest.approx([0.1, 0.1])
    assert rates(PictureClassification(lr=0.1), [0, 50, 100]) == pytest.approx([0.1, 0.05, 0])
    for wrong in ([[5, 0.1], [1, 0.2]], [[1]]):
        with pytest.raises(InputError, match=r"model.lr_steps is .* give a list of .* with rising steps"):
            PictureClassification(lr_steps=wrong)


def test_optimizers():
    adam = PictureClassification(optimizer="adam")
    sgd = PictureClassification(optimizer="sgd", lr=0.1, lr_steps=[])
    rates(adam, []), rates(sgd, [])
    assert isinstance(adam.configure_optimizers()["optimizer"], torch.optim.Adam)
    optimizer = sgd.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, True, 0.1)


class Oracle(nn.Module):
    """Reads the class off the pictures, whose every pixel is it."""

    shape, shown = (1, 28, 28), {"kernel": 0}

    def forward(self, x):
        logits = 50 * F.one_hot((x[:, 0, 0, 0] * 255).round().long(), 10) - torch.arange(10)
        return logits.float(), [torch.ones(2, 2, 3, 3)]


def plain_digits(folder, classes=10, count=12):
    """A folder for each class, whose every pixel is its number."""
    for k in range(classes):
        (folder / str(k)).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (28, 28), (k, k, k)).save(folder / str(k) / f"{i}.png")
    return str(folder)


def test_measures(tmp_path):
    pictures = plain_digits(tmp_path / "own")
    for knows in (True, False):
        model, trainer = PictureClassification(), trainer_of(tmp_path)
        if knows:
            model.network = Oracle()
        else:
            nn.init.zeros_(model.network.last.weight)
            with torch.no_grad():
                model.network.last.bias[:] = torch.tensor([9.0, *[0.0] * 9])
        trainer.test(model, MNISTDataModule(pictures=pictures), verbose=False)
        found = {name: value.item() for name, value in trainer.callback_metrics.items()}
        labels = trainer.datamodule.sets["test"].labels
        wrong = 0 if knows else 100 * (labels != 0).float().mean().item()
        assert found["test/error/model"] == pytest.approx(wrong)
        assert found["test/error/chance"] == 90
        assert found["test/cross_entropy/chance"] == pytest.approx(math.log(10))
        n = len(labels)
        assert n == 20
        p = wrong / 100
        assert found["test/error/model/interval"] == pytest.approx(
            100 * 2.0930 * (p * (1 - p) / (n - 1)) ** 0.5, rel=1e-4
        ), "Student's t, 19 degrees of freedom"
        log_sum = math.log(math.exp(9) + 9)
        expected = 0 if knows else sum(log_sum - 9 * (label == 0) for label in labels.tolist()) / n
        assert found["test/cross_entropy/model"] == pytest.approx(expected, abs=1e-6)
        for measure in (model.measure, *model.further_measures):
            assert measure.metric in found
            assert list(measure.baselines) == ["chance", "linear classifier"]
            assert all(metric in found for metric in measure.baselines.values())
        assert (model.measure.name, model.measure.unit) == ("error", "%")


@pytest.mark.parametrize("classes", [2, 4])
def test_the_linear_baseline_finds_what_is_linear(classes):
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % classes
    centres = 3 * torch.randn(classes, 6, generator=random)
    x = centres[labels] + 0.1 * torch.randn(80, 6, generator=random)
    weight, bias = linear_classifier(x, labels, classes + 1)  # one more, of which there is no picture
    assert weight.shape == (classes + 1, 6)
    logits = F.linear(x, weight, bias)
    assert torch.equal(logits.argmax(1), labels)
    from sklearn.linear_model import LogisticRegression

    probabilities = LogisticRegression(max_iter=50).fit(x.numpy(), labels.numpy()).predict_proba(x.numpy())
    torch.testing.assert_close(
        logits.softmax(1)[:, :-1].double(), torch.from_numpy(probabilities).double(), rtol=1e-4, atol=1e-4
    )


def test_data_and_network_that_do_not_fit(tmp_path):
    own = plain_digits(tmp_path / "own", classes=3)
    cases = [
        ({"network": "wide_resnet", "depth": 10}, MNISTDataModule(source="stand-in"), "the data have 1x28x28"),
        ({"network": "digits"}, CIFAR10DataModule(pictures=own), "the data have 3x32x32"),
        ({"network": "digits"}, MNISTDataModule(pictures=own), "classes is 10: give --model.classes 3"),
    ]
    for options, data, words in cases:
        with pytest.raises(InputError, match=words) as error:
            trainer_of(tmp_path).test(PictureClassification(**options), data, verbose=False)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"model: expected a depth of 10, 16"):
        PictureClassification("wide_resnet", depth=11)


def test_predictions(tmp_path):
    pictures, mine = plain_digits(tmp_path / "own"), tmp_path / "mine"
    mine.mkdir()
    for k in (4, 7):
        Image.new("L", (40, 50), k).save(mine / f"of {k}.png")
    model = PictureClassification()
    model.network = Oracle()
    (written,) = trainer_of(tmp_path).predict(model, MNISTDataModule(pictures=pictures, images=str(mine)))
    assert written["answers_00000.txt"].splitlines()[1:] == [
        f"of {k}.png\t{k} 1.0000\t0 0.0000\t1 0.0000" for k in (4, 7)
    ]
    assert written.keys() == {"answers_00000.txt", "answers_00000.png", "kernel.png"}
    assert all(written[name].dtype == torch.uint8 for name in ("answers_00000.png", "kernel.png"))
    (written,) = trainer_of(tmp_path).predict(model, MNISTDataModule(pictures=pictures, predict_pictures=5))
    lines = written["answers_00000.txt"].splitlines()
    assert len(lines) == 6
    for line in lines[1:]:
        truth, answer = line.split("\t")[:2]
        assert truth.split(", ")[1] == answer.split()[0], "the class that it is in"


def test_a_compiled_network_computes_the_same(monkeypatch):
    graphs, compiler = [], nn.Module.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self: compiler(self, backend=backend, fullgraph=True))
    torch.manual_seed(0)
    model = PictureClassification("wide_resnet", depth=10, compile=True).eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = model(x)[0]
    model.configure_model()
    torch.testing.assert_close(model(x)[0], wanted)
    assert len(graphs) == 1
    assert list(model.state_dict()) == list(PictureClassification("wide_resnet", depth=10).state_dict())


def test_a_grid_has_every_filter_where_it_belongs():
    kernel = torch.zeros(2, 3, 2, 2)
    kernel[0, 1] = torch.tensor([[2.0, -2.0], [0.0, 1.0]])
    kernel[1, 2] = 2.0
    picture = kernel_grid(kernel)
    scale = picture.shape[2] // 8
    assert picture.shape[1:] == (5 * scale, 8 * scale)
    small = picture[0, ::scale, ::scale]
    assert small[:2, 3:5].tolist() == [[255, 0], [128, 191]]
    assert small[3:, 6:].tolist() == [[255, 255]] * 2
    assert (small[2] == 255).all(), "a line between rows"
    assert (small[:2, :2] == 128).all()
    assert kernel_grid(torch.randn(16, 1, 28, 28)).shape == (3, 3 * 115, 3 * 115), "a square of 4 by 4"
    assert kernel_grid(torch.full((2, 2, 3, 3), math.nan)).shape[0] == 3


def test_answers_are_green_where_they_are_right():
    pictures = torch.rand(3, 1, 8, 8)
    sheet = answer_sheet(pictures, ["cat", "dog", "cow"], [True, False, None])
    colours = {tuple(colour) for colour in sheet.flatten(1).T.tolist()}
    for colour, there in (((40, 170, 70), True), ((220, 40, 40), True), ((40, 40, 40), True), ((0, 0, 255), False)):
        assert (colour in colours) == there
    assert (40, 170, 70) not in {tuple(c) for c in answer_sheet(pictures, ["a"] * 3, [None] * 3).flatten(1).T.tolist()}


def test_pictures_are_the_papers_figures(tmp_path):
    for network, names in (("digits", {"second_kernel"}), ("fully_connected", {"first_layer"})):
        model, trainer = PictureClassification(network), trainer_of(tmp_path)
        trainer.validate(model, MNISTDataModule(source="stand-in", val_pictures=4), verbose=False)
        found = model.pictures(batch())
        assert found.keys() == names | {"answers"}
        assert all(p.dtype == torch.uint8 and p.shape[0] == 3 for p in found.values())
        assert {f"val/{name}_{statistic}" for name in names for statistic in ("mean", "std")} <= set(
            trainer.callback_metrics
        )
        (name,) = names
        kernel = model.network.kernels()[model.network.shown[name]]
        assert trainer.callback_metrics[f"val/{name}_std"].item() == pytest.approx(kernel.std().item(), rel=1e-5)
    assert WideResNet(depth=16).shown == {"conv2": 4, "conv3": 8, "conv4": 12}
    assert np.prod(WideResNet(depth=16).kernels()[12].shape) == 64 * 64 * 9
