import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from lightning_meta.learnets.one_shot import (
    TRUNKS,
    OneShotNetwork,
    OneShotRecognition,
    Similarity,
    _errors,
    episode_softmax,
    nearest_images,
    pair_logistic,
)
from lightning_meta.learnets.one_shot_data import Episodes, OneShotDataModule
from lightning_meta.running.segments import Episode, Segment
from lightning_meta.sources import characters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*no logger configured"),
]
COUNTS = {
    "siamese": 550_880,
    "unshared": 1_101_760,
    "factorised": 1_064_128,
    "siamese_learnet": 2_196_544,
    "learnet": 2_721_344,
    "prototypical": 550_880,
}
VARIANTS = pytest.mark.parametrize("variant", COUNTS)
METRICS = pytest.mark.parametrize("metric", ["inner_product", "euclidean", "weighted_l1", "squared_euclidean"])
WHOLE = Segment(0, 0, 1, True)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def network(variant="learnet", metric="weighted_l1", trunk="paper", batch_norm=True, offset=True):
    """In float64, with random statistics, scales and offsets, because initial values could hide errors."""
    torch.manual_seed(0)
    net = OneShotNetwork(variant, metric, trunk, batch_norm, offset).double().eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.2)
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    with torch.no_grad():
        net.similarity.scale.mul_(torch.rand_like(net.similarity.scale) + 0.5)
        if offset:
            net.similarity.offset.add_(0.7)
    return net


@VARIANTS
def test_numbers_of_weights(variant):
    net = OneShotNetwork(variant, "weighted_l1", "paper", batch_norm=False, offset=True)
    weights = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.similarity.parameters())
    assert weights == COUNTS[variant]


@pytest.mark.parametrize(
    ("metric", "offset", "count"), [("weighted_l1", True, 513), ("weighted_l1", False, 512), ("euclidean", True, 2)]
)
def test_numbers_of_weights_of_the_similarity(metric, offset, count):
    assert sum(p.numel() for p in Similarity(metric, 512, offset).parameters()) == count


@VARIANTS
@pytest.mark.parametrize(("trunk", "sides"), [("paper", [24, 8, 1]), ("deep", [28, 14, 7, 1])])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_28_pixels_become_one(variant, trunk, sides, batch_norm):
    net = OneShotNetwork(variant, "euclidean", trunk, batch_norm, False)
    seen, hooks = [], []
    for layer in net.pupil.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            hooks.append(layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[-1])))
    pictures = torch.rand(2, 1, 28, 28)
    filters = torch.randn(2, *net.pupil.middle.filter_shape) if hasattr(net, "learnet") else None
    embedding = net.pupil(pictures, filters)
    assert embedding.shape == (2, TRUNKS[trunk].last[0])
    assert seen == (sides if isinstance(net.pupil.middle, nn.Conv2d) else [*sides[:-2], sides[-1]])
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules()) == batch_norm
    if filters is not None:
        written, classifier = net.learnet(pictures)
        assert written.shape == filters.shape
        assert (None if classifier is None else classifier.shape) == (embedding.shape if variant == "learnet" else None)


def embedding(pupil, picture, filters=None):
    """Embed one image; a loop over channels applies its own filters."""
    x, middle = pupil.front(picture[None]), pupil.middle
    if isinstance(middle, nn.Conv2d):
        return pupil.back(middle(x))[0]
    filters = pupil.filters[0] if filters is None else filters
    x = middle.M(x)
    channels = [F.conv2d(x[:, c : c + 1], w[None, None], padding=middle.padding) for c, w in enumerate(filters)]
    return pupil.back(middle.M_prime(torch.cat(channels, 1)))[0]


def gamma(similarity, a, b):
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    scale = similarity.scale.tolist()
    offset = float(similarity.offset)
    if similarity.metric == "inner_product":
        return scale[0] * sum(x * y for x, y in pairs) + offset
    if similarity.metric == "euclidean":
        return offset - scale[0] * math.sqrt(sum((x - y) ** 2 for x, y in pairs))
    if similarity.metric == "squared_euclidean":
        return offset - scale[0] * sum((x - y) ** 2 for x, y in pairs)
    return offset - sum(abs(w * x - w * y) for w, (x, y) in zip(scale, pairs, strict=True))


def pair_score(net, exemplar, query):
    """The score of one exemplar and one query, by the paper's equations."""
    if net.variant == "siamese":
        a, b = embedding(net.pupil, exemplar), embedding(net.pupil, query)
    elif net.variant in ("unshared", "factorised"):
        a, b = embedding(net.exemplar_pupil, exemplar), embedding(net.pupil, query)
    else:
        features = net.learnet.trunk(exemplar[None])
        filters = net.learnet.write_filters(features).view(net.pupil.middle.filter_shape)
        b = embedding(net.pupil, query, filters)
        if net.variant == "learnet":
            a = net.learnet.write_embedding(features).flatten()
        else:
            a = embedding(net.pupil, exemplar, filters)
    return gamma(net.similarity, a, b)


def literal_scores(net, exemplars, queries):
    E, W, S = exemplars.shape[:3]
    if net.variant == "prototypical":
        means = [[sum(embedding(net.pupil, z) for z in shots) / S for shots in row] for row in exemplars]
        scores = [
            [[gamma(net.similarity, mean, embedding(net.pupil, x)) for x in queries[e]] for mean in means[e]]
            for e in range(E)
        ]
    else:
        scores = [
            [[pair_score(net, exemplars[e, w, s], x) for x in queries[e]] for w in range(W) for s in range(S)]
            for e in range(E)
        ]
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize(("trunk", "batch_norm", "offset"), [("paper", True, True), ("deep", False, False)])
@METRICS
@VARIANTS
@torch.no_grad()
def test_scores_are_those_of_one_pair_after_another(variant, metric, trunk, batch_norm, offset):
    net = network(variant, metric, trunk, batch_norm, offset)
    exemplars, queries = randn(2, 2, 2, 1, 28, 28), randn(2, 3, 1, 28, 28)
    scores, filters = net(exemplars, queries)
    assert scores.shape == (2, 2 if variant == "prototypical" else 4, 3)
    torch.testing.assert_close(scores, literal_scores(net, exemplars, queries), rtol=1e-9, atol=1e-9)
    if "learnet" in variant:
        assert filters.shape == (2, 4, *net.pupil.middle.filter_shape)
    else:
        assert filters is None


@METRICS
def test_a_similarity_has_finite_gradients_where_two_embeddings_are_the_same(metric):
    similarity = Similarity(metric, 6, True).double()
    a, b = randn(3, 6).requires_grad_(), randn(3, 6)
    assert torch.autograd.gradcheck(similarity, (a, b.requires_grad_()))
    similarity(a, a.detach()).sum().backward()
    assert all(value.isfinite().all() for value in (a.grad, similarity.scale.grad, similarity.offset.grad))


@METRICS
def test_a_similarity_is_computed_in_float32_at_least(metric):
    similarity, a, b = Similarity(metric, 512, True), randn(4, 512).bfloat16(), randn(512).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = similarity(a, b)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), similarity.double()(a.double(), b.double()), rtol=1e-4, atol=1e-4)


def test_the_responses_of_a_picture_are_what_exemplars_filters_give():
    net = network("learnet")
    x, filters = randn(2, 3, 1, 28, 28), randn(2, 4, 64, 5, 5)
    responses = net.pupil.responses(x, filters)
    assert responses.shape == (8, 3, 64, 8, 8)
    projected = net.pupil.middle.M(net.pupil.front(x[1, 2:]))
    wanted = F.conv2d(projected, filters[1, 3][:, None], groups=64)[0]
    torch.testing.assert_close(responses[4 + 3, 2], wanted, rtol=1e-9, atol=1e-9)


@VARIANTS
def test_every_weight_gets_a_gradient(variant):
    net = network(variant, "inner_product", offset=False).train()
    scores, _ = net(randn(2, 3, 2, 1, 28, 28), randn(2, 6, 1, 28, 28))
    episode_softmax(scores, torch.rand_like(scores) > 0.5).backward()
    assert all(p.grad.any() for p in net.parameters())


def same_pairs(labels, ways, shots):
    """Matching pairs (E, W * S, X) for labels (E, X)."""
    return torch.tensor([[[w == label for label in row] for w in range(ways) for _ in range(shots)] for row in labels])


def test_pairs_have_the_papers_loss():
    scores, same = 3 * randn(2, 6, 5), same_pairs([[0, 1, 2, 1, 0], [2, 2, 1, 0, 0]], 3, 2)
    losses = {1: [], -1: []}
    for score, match in zip(scores.flatten().tolist(), same.flatten().tolist(), strict=True):
        l = 1 if match else -1
        losses[l].append(math.log(1 + math.exp(-l * score)))
    halves = [sum(values) / len(values) for values in losses.values()]
    assert pair_logistic(scores, same).item() == pytest.approx(sum(halves) / 2, rel=1e-12)
    huge = torch.tensor([[[1e4, -1e4]]])
    assert pair_logistic(huge, torch.tensor([[[True, False]]])) == 0
    assert pair_logistic(huge, torch.tensor([[[False, True]]])) == 1e4
    assert torch.autograd.gradcheck(lambda s: pair_logistic(s, same), scores.requires_grad_())


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("labels", [[[0, 1, 2], [2, 0, 1]], [[0, 1, 2, 1, 0, 2], [2, 2, 1, 0, 0, 1]]])
def test_an_episode_has_two_soft_maxes(labels, shots):
    same = same_pairs(labels, 3, shots)
    scores = 2 * randn(*same.shape)
    E, Z, X = same.shape

    def cross_entropies(rows, matches):
        """Cross-entropy of each row with a uniform target over its matches."""
        for row, match in zip(rows, matches, strict=True):
            total = sum(math.exp(score) for score in row)
            right = [math.log(math.exp(score) / total) for score, m in zip(row, match, strict=True) if m]
            yield -sum(right) / len(right)

    of_exemplars = [h for e in range(E) for h in cross_entropies(scores[e].tolist(), same[e].tolist())]
    of_queries = [h for e in range(E) for h in cross_entropies(scores[e].T.tolist(), same[e].T.tolist())]
    assert (len(of_exemplars), len(of_queries)) == (E * Z, E * X)
    wanted = (sum(of_exemplars) / (E * Z) + sum(of_queries) / (E * X)) / 2
    assert episode_softmax(scores, same).item() == pytest.approx(wanted, rel=1e-12)
    if X == Z == 3:
        targets = same.int().argmax(1)  # the exemplar of each query
        plain = [F.cross_entropy(scores, targets), F.cross_entropy(scores.mT, same.int().argmax(2))]
        assert episode_softmax(scores, same).item() == pytest.approx(sum(plain).item() / 2, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: episode_softmax(s, same), scores.requires_grad_())


def test_class_scores_are_means_over_shots():
    model = OneShotRecognition("siamese_learnet", "euclidean").double().eval()
    exemplars, queries = randn(2, 3, 4, 1, 28, 28), randn(2, 5, 1, 28, 28)
    with torch.no_grad():
        scores = model.class_scores(exemplars, queries)
        assert scores.shape == (2, 3, 5)
        parts = [model.class_scores(exemplars[:, :, s : s + 1], queries) for s in range(4)]
    torch.testing.assert_close(scores, sum(parts) / 4, rtol=1e-9, atol=1e-9)


def episodes(labels, choose, ways=None):
    E, X = labels.shape
    ways = ways or X
    return Episodes(torch.zeros(E, ways, 1, 1, 4, 4), torch.zeros(E, X, 1, 4, 4), labels, WHOLE, choose)


def shuffled_labels(E, ways, queries=1):
    random = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(ways * queries, generator=random) % ways for _ in range(E)])


CHOICES = pytest.mark.parametrize("choose", ["candidate", "class"])


@CHOICES
def test_right_scores_have_no_error(choose):
    labels = shuffled_labels(50, 6)
    right = (torch.arange(6)[:, None] == labels[:, None]).float()
    assert (_errors(right, episodes(labels, choose)) == 0).all()
    assert (_errors(right + 0.4 * torch.rand_like(right), episodes(labels, choose)) == 0).all()
    assert (_errors(-right, episodes(labels, choose)) == 100).all()


@CHOICES
@pytest.mark.parametrize("value", [0.0, -3.0, float("inf")])
def test_a_network_that_says_always_the_same_is_at_chance(choose, value):
    """Ties go to the first class, which is right for one question in each episode."""
    errors = _errors(torch.full((30, 20, 20), value), episodes(shuffled_labels(30, 20), choose))
    assert errors.tolist() == pytest.approx([95] * 30)


@CHOICES
def test_a_network_that_goes_by_the_place_is_at_chance(choose, greys):
    """Queries need to be shuffled: in the order of their classes there would be no error."""
    data = OneShotDataModule(source="stand-in")
    data.setup("fit")
    labels = [data.sets["val"][i, Segment(i, 0, 1, True, Episode(20, 1, 1))][0][-1] for i in range(500)]
    errors = _errors(torch.eye(20).expand(500, -1, -1), episodes(torch.from_numpy(np.stack(labels)), choose))
    assert errors.mean().item() == pytest.approx(95, abs=1)


def test_candidates_are_chosen_by_exemplars_and_classes_by_queries():
    scores = torch.tensor([[[5.0, 4, 3], [6, 1, 0], [0, 0, 7]]])  # exemplars 0 and 1 both choose query 0
    labels = torch.tensor([[0, 1, 2]])
    assert _errors(scores, episodes(labels, "candidate")).item() == pytest.approx(100 / 3)
    # query 0 chooses class 1, query 1 class 0, query 2 class 2
    assert _errors(scores, episodes(labels, "class")).item() == pytest.approx(200 / 3)


@CHOICES
def test_errors_are_counted_one_after_another(choose):
    labels, scores = shuffled_labels(30, 5), randn(30, 5, 5)
    wanted = []
    for row, answers in zip(scores.tolist(), labels.tolist(), strict=True):
        wrong = 0
        if choose == "candidate":
            for w in range(5):
                best = max(range(5), key=lambda x, w=w: row[w][x])
                wrong += answers[best] != w
        else:
            for x in range(5):
                wrong += max(range(5), key=lambda w, x=x: row[w][x]) != answers[x]
        wanted.append(100 * wrong / 5)
    assert _errors(scores, episodes(labels, choose)).tolist() == pytest.approx(wanted)


def test_several_queries_of_a_class_are_counted_each():
    labels = torch.tensor([[1, 0, 1, 0]])
    scores = torch.tensor([[[0.0, 1, 1, 1], [1, 0, 0, 0]]])
    assert _errors(scores, episodes(labels, "class", ways=2)).item() == 25


def test_the_nearest_picture_is_the_nearest_of_any_shot():
    exemplars, queries = randn(2, 3, 4, 1, 5, 5), randn(2, 6, 1, 5, 5)
    scores = nearest_images(exemplars, queries)
    for e in range(2):
        for w in range(3):
            for x in range(6):
                distances = [(exemplars[e, w, s] - queries[e, x]).square().sum().sqrt().item() for s in range(4)]
                assert scores[e, w, x].item() == pytest.approx(-min(distances), rel=1e-5)
    same = queries[:, :3, None]
    assert nearest_images(same, queries).argmax(1)[:, :3].tolist() == [[0, 1, 2]] * 2
    assert nearest_images(same.bfloat16(), queries.bfloat16()).dtype == torch.float32


class Oracle(nn.Module):
    """Recognises characters by their brightness; each has its own grey."""

    def forward(self, exemplars, queries):
        a, b = exemplars.flatten(1, 2).mean((-3, -2, -1)), queries.mean((-3, -2, -1))
        return -(a[:, :, None] - b[:, None]).abs(), None


class Indifferent(nn.Module):
    def forward(self, exemplars, queries):
        return torch.ones(len(exemplars), exemplars[0].shape[:2].numel(), queries.shape[1]), None


@pytest.fixture
def greys(monkeypatch):
    """Alphabets of 20 characters with 20 drawings; drawings differ less than characters."""
    levels = 10 * torch.arange(20)[:, None] + torch.arange(20) % 4
    images = levels[:, :, None, None].expand(-1, -1, 28, 28).to(torch.uint8)
    alphabet = characters.Alphabet(images, list(range(20)))
    names = ("Latin", "Lisu"), ("Lao",)
    monkeypatch.setattr(characters, "font_alphabets", lambda: tuple(dict.fromkeys(part, alphabet) for part in names))


def trainer_of(folder):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )


def results_of(model, folder, **options):
    trainer = trainer_of(folder)
    data = OneShotDataModule(
        source="stand-in",
        tests={"few": {"ways": 5, "shots": 3, "choose": "class"}},
        **{"test_episodes": 30, "batch_size": 8} | options,
    )
    trainer.test(model, data, verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


CASES = {"20-way 1-shot within an alphabet": 95, "few": 80}


def test_a_network_that_knows_is_never_wrong(tmp_path, greys):
    model = OneShotRecognition()
    model.network = Oracle()
    results = results_of(model, tmp_path)
    for case, chance in CASES.items():
        assert results[f"test/{case}/model"] == 0
        assert results[f"test/{case}/model/interval"] == 0
        assert results[f"test/{case}/nearest picture"] == 0
        assert results[f"test/{case}/chance"] == pytest.approx(chance)
    measures = [model.measure, *model.further_measures]
    assert [(m.name, m.unit, m.metric) for m in measures] == [(c, "error, %", f"test/{c}/model") for c in CASES]
    assert model.measure.baselines.keys() == {"chance", "nearest picture"}
    assert all(name in results for m in measures for name in m.baselines.values())


def test_validation_has_the_error_of_the_first_case(tmp_path, greys):
    for knows, error in ((True, 0), (False, 95)):
        model = OneShotRecognition()
        model.network = Oracle() if knows else Indifferent()
        (results,) = trainer_of(tmp_path).validate(model, OneShotDataModule(source="stand-in"), verbose=False)
        assert results == {"val/error": pytest.approx(error)}
    model = OneShotRecognition("siamese_learnet")
    data = OneShotDataModule(source="stand-in", val_episodes=2, batch_size=1, ways=3)
    (results,) = trainer_of(tmp_path).validate(model, data, verbose=False)
    assert 0 < results["val/filter_variation"] < 0.5


def test_a_network_that_does_not_look_is_at_chance(tmp_path, greys):
    model = OneShotRecognition()
    model.network = Indifferent()
    results = results_of(model, tmp_path)
    for case, chance in CASES.items():
        assert results[f"test/{case}/model"] == pytest.approx(chance)
        assert results[f"test/{case}/chance"] == pytest.approx(chance)


def test_a_result_is_the_mean_of_all_episodes_with_its_interval(tmp_path, greys):
    """The last batch is smaller and has less weight."""
    model = OneShotRecognition()
    model.network, errors = Oracle(), []

    def often_right(exemplars, queries):
        scores = model.network(exemplars, queries)[0]
        scores = scores + 0.03 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(len(errors)))
        if exemplars.shape[1] == 20:
            right = model.network(exemplars, queries)[0].argmax(2)  # the candidate of each exemplar
            errors.extend((100 * (scores.argmax(2) != right).double().mean(1)).tolist())
        return scores.unflatten(1, (exemplars.shape[1], -1)).mean(2)

    model.class_scores = often_right
    results, first = results_of(model, tmp_path), next(iter(CASES))
    assert len(errors) == 30
    mean = sum(errors) / 30
    deviation = math.sqrt(sum((error - mean) ** 2 for error in errors) / 29)
    assert deviation > 1
    assert results[f"test/{first}/model"] == pytest.approx(mean, rel=1e-4)
    assert results[f"test/{first}/model/interval"] == pytest.approx(2.0452 * deviation / math.sqrt(30), rel=1e-4)


def test_training_knows_which_pairs_are_of_one_class(monkeypatch):
    """The loss is that of the network's scores, for several shots and queries and both losses."""
    labels = torch.tensor([[0, 1, 1, 0, 2, 2], [2, 1, 0, 0, 1, 2]])
    batch = Episodes(randn(2, 3, 2, 1, 28, 28), randn(2, 6, 1, 28, 28), labels, WHOLE)
    for variant in ("siamese", "learnet", "prototypical"):
        for loss, function in (("logistic", pair_logistic), ("softmax", episode_softmax)):
            model = OneShotRecognition(variant, loss=loss).double().eval()
            logged = {}
            monkeypatch.setattr(model, "log", lambda name, value, logged=logged, **_: logged.update({name: value}))
            scores, _ = model.network(batch.exemplars, batch.queries)
            wanted = function(scores, same_pairs(labels.tolist(), 3, 1 if variant == "prototypical" else 2))
            torch.testing.assert_close(model.training_step(batch, 0), wanted)
            assert ("train/filter_variation" in logged) == (variant == "learnet")
            assert isinstance(model.network.similarity.offset, nn.Parameter) == (loss == "logistic")


@pytest.mark.parametrize(
    ("options", "factors"),
    [({}, [1, 0.5, 0, 0]), ({"lr": 0.01, "final_lr": 1e-4, "optimizer": "sgd"}, [1, 0.1, 0.01, 0.01])],
)
def test_learning_rates(options, factors):
    model = OneShotRecognition("siamese", weight_decay=0.1, **options)
    model.trainer = Trainer(accelerator="cpu", max_steps=100, logger=False, enable_checkpointing=False)
    made = model.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    rates = [made["lr_scheduler"]["scheduler"].lr_lambdas[0](step) for step in (0, 50, 100, 120)]
    assert rates == pytest.approx(factors, abs=1e-9)
    (group,) = made["optimizer"].param_groups
    assert group["weight_decay"] == 0.1
    assert group.get("momentum") == (0.9 if options else None)
    assert len(group["params"]) == len(list(model.parameters()))


@VARIANTS
def test_pictures_of_answers_and_responses(variant):
    torch.manual_seed(0)
    model = OneShotRecognition(variant).eval()
    batch = Episodes(torch.rand(2, 6, 2, 1, 28, 28), torch.rand(2, 6, 1, 28, 28), shuffled_labels(2, 6), WHOLE)
    with torch.no_grad():
        pictures = model.pictures(batch)
    assert pictures.keys() == ({"answers", "responses"} if "learnet" in variant else {"answers"})
    for picture in pictures.values():
        assert picture.dtype == torch.uint8
        assert picture.shape[0] == 3
        assert min(picture.shape[1:]) > 5 * 28
