import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lightning_meta.hypernetworks.translator import Attention, Translator
from lightning_meta.sources.subwords import BOS, EOS, PAD, UNKNOWN

V = 7  # three pieces besides the special ones


def translator(network="lstm", **options):
    torch.manual_seed(0)
    sizes = {"piece_size": 3, "hidden_size": 5, "layer_norm": False, "hyper_size": 4, "embedding_size": 2}
    model = Translator(V, network=network, **sizes | options).double().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.8)
    return model


def sentences(*lengths):
    """Random pieces, each sentence with its end, then padding."""
    random = torch.Generator().manual_seed(sum(lengths))
    x = torch.full((max(lengths), len(lengths)), PAD)
    for b, length in enumerate(lengths):
        x[: length - 1, b] = torch.randint(UNKNOWN + 1, V, (length - 1,), generator=random)
        x[length - 1, b] = EOS
    return x


def literally(model, source, target):
    """-log P of each piece of one sentence, and attention: written again from the equations, step by step."""
    encoder, decoder, H = model.encoder, model.decoder, 5

    def run(layer, xs):
        state, outputs = None, []
        for x in xs:
            y, state = layer(x.view(1, 1, -1), state)
            outputs.append(y[0, 0])
        return outputs

    x = [encoder.embed.weight[piece] for piece in source]
    both = [encoder.layers[0](torch.stack(x)[:, None])[0][t, 0] for t in range(len(x))]
    forwards = encoder.layers[0]
    assert both[0].shape == (2 * H,)
    reversed_state = forwards(torch.stack(x)[:, None])[1][0][1, 0, :H]  # of the direction that ends at the first piece
    torch.testing.assert_close(both[0][H:], reversed_state)
    x = run(encoder.layers[1], both)
    for layer in encoder.layers[2:]:
        x = [new + old for new, old in zip(run(layer, x), x, strict=True)]
    pieces = [BOS, *target[:-1]]
    q = run(decoder.layers[0], [decoder.embed.weight[piece] for piece in pieces])
    attention, contexts = [], []
    for query in q:
        hidden = [
            torch.tanh(
                decoder.attention.query.weight @ query + decoder.attention.key.weight @ v + decoder.attention.key.bias
            )
            for v in x
        ]
        odds = torch.stack([decoder.attention.score.weight[0] @ h for h in hidden]).exp()
        attention.append(odds / odds.sum())
        contexts.append(sum(a * v for a, v in zip(attention[-1], x, strict=True)))
    y = run(decoder.layers[1], [torch.cat(pair) for pair in zip(q, contexts, strict=True)])
    for layer in decoder.layers[2:]:
        above = run(layer, [torch.cat(pair) for pair in zip(y, contexts, strict=True)])
        y = [new + old for new, old in zip(above, y, strict=True)]
    logits = [decoder.output(h) for h in y]
    costs = [F.cross_entropy(row, torch.tensor(piece)) for row, piece in zip(logits, target, strict=True)]
    return torch.stack(costs), torch.stack(attention)


@pytest.mark.parametrize("network", ["lstm", "hyper_lstm"])
@pytest.mark.parametrize("layers", [(2, 2), (4, 3)])
def test_whole_batches_are_what_the_equations_say_sentence_by_sentence(network, layers):
    model = translator(network, encoder_layers=layers[0], decoder_layers=layers[1])
    source, target = sentences(3, 6, 2), sentences(4, 2, 5)
    nats = model(source, target)
    assert nats.shape == (5, 3)
    for b, (s, t) in enumerate([(3, 4), (6, 2), (2, 5)]):
        wanted, _ = literally(model, source[:s, b].tolist(), target[:t, b].tolist())
        torch.testing.assert_close(nats[:t, b], wanted)
        assert not nats[t:, b].any()


def test_every_weight_learns():
    model = translator("hyper_lstm", encoder_layers=3, decoder_layers=3).train()
    model(sentences(3, 6), sentences(4, 5)).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    assert all(weight.grad.any() for weight in model.parameters())


def test_attention_sees_no_padding():
    attention = Attention(4).double()
    values, queries = torch.randn(1, 5, 4).double(), torch.randn(1, 2, 4).double()
    present = torch.tensor([[True, True, True, False, False]])
    context, weights = attention(queries, attention.memory(values, present))
    assert not weights[..., 3:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2).double())
    alone, _ = attention(queries, attention.memory(values[:, :3], present[:, :3]))
    torch.testing.assert_close(context, alone)


def test_dropout_enters_every_layer_in_training_alone():
    model = translator("lstm", encoder_layers=3, decoder_layers=3, dropout=0.5)
    source, target = sentences(6, 6), sentences(5, 5)
    assert torch.equal(model(source, target), model(source, target))
    shares = []
    for layer in (*model.encoder.layers, *model.decoder.layers):
        layer.register_forward_pre_hook(
            lambda module, x: shares.append((getattr(x[0], "data", x[0]) == 0).double().mean())
        )
    model.train()(source, target)
    assert len(shares) == 6
    assert all(0.2 < share < 0.8 for share in shares)


def exhaustive(model, source, longest, alpha, beta):
    """The best translation of one sentence among all, by the printed formulae."""
    best = (-math.inf, None)
    for length in range(longest):
        for body in itertools.product(range(UNKNOWN + 1, V), repeat=length):
            target = [*body, EOS]
            costs, attention = literally(model, source, target)
            covered = attention.sum(0).clamp(max=1).log().sum()
            score = -costs.sum() / ((5 + len(target)) ** alpha / 6**alpha) + beta * covered
            best = max(best, (score.item(), target))
    return best


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.8, 0.0), (0.6, 1.5)])
def test_a_beam_as_wide_as_everything_finds_the_best(alpha, beta):
    model = translator()
    source, longest = sentences(3, 4), torch.tensor([3, 4])
    found = model.beam_search(source, longest, 200, alpha, beta)
    for b, length in enumerate([3, 4]):
        score, target = exhaustive(model, source[:length, b].tolist(), int(longest[b]), alpha, beta)
        assert found.scores[b].item() == pytest.approx(score)
        assert found.subwords[:, b].tolist() == target + [PAD] * (4 - len(target))
        _, attention = literally(model, source[:length, b].tolist(), target)
        torch.testing.assert_close(found.attention[b, : len(target), :length], attention)


@pytest.mark.parametrize("network", ["lstm", "hyper_lstm"])
def test_a_beam_of_one_takes_the_likeliest_piece_each_time(network):
    model = translator(network)
    source, longest = sentences(3, 6, 5, 2), torch.tensor([5, 8, 2, 7])
    found = model.beam_search(source, longest, 1)
    for b in range(4):
        read, written = source[:, b][source[:, b] != PAD].tolist(), []
        while EOS not in written:
            costs = {p: literally(model, read, [*written, p])[0][-1].item() for p in (EOS, *range(UNKNOWN + 1, V))}
            written.append(min(costs, key=costs.get) if len(written) + 1 < longest[b] else EOS)
        assert [p for p in found.subwords[:, b].tolist() if p != PAD] == written


def slow_search(model, source, longest, beam, alpha, beta):
    """One sentence, with lists."""
    alive, finished, likeliest = [(0.0, [])], [], -math.inf
    for t in range(longest):
        candidates = []
        for total, written in alive:
            for piece in (EOS, *range(UNKNOWN + 1, V)) if t + 1 < longest else (EOS,):
                costs, attention = literally(model, source, [*written, piece])
                candidates.append((total - costs[-1].item(), [*written, piece], attention))
        candidates.sort(key=lambda c: -c[0])
        for total, written, attention in candidates[:beam]:
            if written[-1] == EOS:
                covered = attention.sum(0).clamp(max=1).log().sum().item()
                finished.append((total / ((5 + len(written)) / 6) ** alpha + beta * covered, written))
                likeliest = max(likeliest, total)
        alive = [(total, written) for total, written, _ in candidates if written[-1] != EOS][:beam]
        if len(finished) >= beam and all(total <= likeliest for total, _ in alive):
            break
    return max(finished)


@pytest.mark.parametrize("beam", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_batched_search_is_the_slow_one(beam):
    model = translator("hyper_lstm", encoder_layers=3, decoder_layers=3)
    source, longest = sentences(3, 6, 2), torch.tensor([6, 5, 6])
    found = model.beam_search(source, longest, beam, 0.6, 0.4)
    for b, length in enumerate([3, 6, 2]):
        score, written = slow_search(model, source[:length, b].tolist(), int(longest[b]), beam, 0.6, 0.4)
        assert found.scores[b].item() == pytest.approx(score)
        assert [p for p in found.subwords[:, b].tolist() if p != PAD] == written
        alone = model.beam_search(source[:length, b : b + 1], longest[b : b + 1], beam, 0.6, 0.4)
        assert alone.scores.item() == pytest.approx(found.scores[b].item())


def test_unlikely_ends_do_not_stop_the_search():
    """A model that is sure of eight pieces and then the end: by then other hypotheses have ended, one a step."""
    model = translator()
    vocabulary = model.decoder.output.out_features
    odds = torch.full((10, vocabulary), -20.0)
    odds[:8, UNKNOWN + 1], odds[8:, EOS], odds[:8, EOS] = 0.0, 0.0, -5.0

    def sure(pieces, memory, states=None):
        t = 0 if states is None else int(states[0][0][0, 0, 0])
        state = torch.full((1, pieces.shape[1], 1), t + 1.0)
        weights = torch.ones(pieces.shape[1] // len(memory.values), len(memory.values), 1, memory.values.shape[1])
        return odds[t].expand(1, pieces.shape[1], -1), [(state, state)], weights

    model.decoder.forward = sure
    source = sentences(3)
    for beam in (1, 2, 4):
        found = model.beam_search(source, torch.tensor([12]), beam, 0.2, 0.2)
        assert found.subwords[:, 0].tolist() == [UNKNOWN + 1] * 8 + [EOS] + [PAD] * 3


def test_as_many_parameters_as_its_parts():
    H, D = 5, 3
    model = translator(encoder_layers=3, decoder_layers=3)

    def lstm(inputs):
        return 4 * H * (inputs + H + 1)

    encoder = V * D + 2 * lstm(D) + lstm(2 * H) + lstm(H)
    decoder = V * D + lstm(D) + 2 * lstm(2 * H) + (2 * H * H + H + H) + V * (H + 1)
    assert sum(weight.numel() for weight in model.parameters()) == encoder + decoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_layers": 1}, "encoder_layers"),
        ({"decoder_layers": 1}, "decoder_layers"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=f"expected.*{message}"):
        translator(**options)
