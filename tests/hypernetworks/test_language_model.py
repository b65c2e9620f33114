import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.language_model import LanguageModel, SymbolPredictor
from lightning_meta.hypernetworks.text_data import TextBatch
from lightning_meta.hypernetworks.trace_figures import GATES, annotated_text, histogram
from lightning_meta.running.segments import Segment
from tests.conftest import arguments

TEXT = "the quick brown fox jumps over the lazy dog; " * 60


def model(text=TEXT, **options):
    torch.manual_seed(0)
    sizes = {"symbols": 30, "hidden_size": 7, "hyper_size": 4, "embedding_size": 2, "dropout": 0.0}
    module = LanguageModel(**sizes | {"recurrent_dropout": 0.0} | options).double()
    found = torch.tensor(sorted({ord(letter) for letter in text}))
    decode = lambda symbols: "".join(map(chr, symbols))  # noqa: E731
    data = types.SimpleNamespace(vocabulary=found, decode=decode, data_name="a text", hparams=types.SimpleNamespace())
    module._trainer = types.SimpleNamespace(datamodule=data)
    return module


def lines(text=TEXT, readers=2, steps=9):
    symbols = torch.tensor([[ord(letter) for letter in text[j : j + steps + 1]] for j in range(readers)])
    return TextBatch(symbols, torch.ones(readers, steps, dtype=torch.bool), Segment(0, 0, steps, False))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"network": "lstm", "layer_norm": False}, 4_254_050),  # table 3, Penn Treebank
        ({"network": "lstm", "layer_norm": False, "hidden_size": 1250}, 6_567_550),
        ({"network": "lstm", "layer_norm": False, "num_layers": 2}, 12_258_050),
        ({"layer_norm": False}, 4_911_874),
        ({}, 4_923_154),
        ({"embedding_size": 16, "num_layers": 2}, 14_407_714),
        (
            {"symbols": 205, "hidden_size": 1800, "hyper_size": 256, "embedding_size": 64, "layer_norm": False},
            18_708_213,
        ),
        ({"symbols": 205, "hidden_size": 2048, "hyper_size": 512, "embedding_size": 64}, 26_541_773),  # table 4, enwik8
    ],
)
def test_as_many_parameters_as_the_paper_prints(options, count):
    with torch.device("meta"):
        module = LanguageModel(**options)
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("network", ["lstm", "hyper_lstm"])
def test_the_score_is_the_mean_of_scored_symbols_in_bits(network):
    module, batch = model(network=network), lines()
    module.on_fit_start()
    batch.scored[:, :4] = False
    bits, state = module.score(batch, None)
    wanted = []
    for j in range(2):
        numbers = [module.vocabulary.tolist().index(symbol) for symbol in batch.symbols[j].tolist()]
        inputs = F.one_hot(torch.tensor(numbers[:-1]), 30).double()
        hidden, _ = module.predictor.recurrent(inputs)
        odds = module.predictor.output(hidden).softmax(1)
        wanted += [-odds[t, numbers[t + 1]].log2().item() for t in range(4, 9)]
    assert bits.item() == pytest.approx(sum(wanted) / len(wanted))
    assert state[0].shape[:2] == (1, 2)


def test_a_uniform_model_takes_the_logarithm_of_its_symbols():
    module = model(symbols=50)
    module.on_fit_start()
    torch.nn.init.zeros_(module.predictor.output.weight)
    torch.nn.init.zeros_(module.predictor.output.bias)
    assert module.score(lines(), None)[0].item() == pytest.approx(5.644, abs=1e-3)


def test_a_text_in_pieces_scores_as_in_one():
    module = model(num_layers=2)
    module.on_fit_start()
    whole, state, total = module.score(lines(steps=40), None)[0], None, 0.0
    for start in range(0, 40, 10):
        bits, state = module.score(lines(TEXT[start:], steps=10), state)
        total += bits.item() / 4
    assert total == pytest.approx(whole.item())


def test_dropout_drops_symbols_outputs_and_what_lies_between_layers():
    torch.manual_seed(0)
    predictor = SymbolPredictor(4, 0.5, "lstm", 200, num_layers=2, layer_norm=False)
    inputs, outputs = [], []
    predictor.recurrent.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    predictor.output.register_forward_pre_hook(lambda module, arguments: outputs.append(arguments[0]))
    predictor(torch.zeros(50, 20, dtype=torch.long))
    assert set(inputs[0].unique().tolist()) == {0.0, 2.0}
    assert 0.4 < (inputs[0].amax(2) == 0).float().mean() < 0.6
    assert 0.4 < (outputs[0] == 0).float().mean() < 0.6
    assert predictor.recurrent.dropout == 0.5
    predictor.eval()(torch.zeros(50, 20, dtype=torch.long))
    assert inputs[1].amax(2).eq(1).all()
    assert not outputs[1].eq(0).any()


def test_symbols_that_do_not_fit():
    module = model(symbols=5)
    with pytest.raises(InputError, match=r"a text has 28 different symbols, but model.symbols is 5: give --model.sym"):
        module.on_fit_start()
    module = model(TEXT + "Z")
    module.on_fit_start()
    assert module.vocabulary.tolist()[:3] == sorted(map(ord, set(TEXT + "Z")))[:3]
    module._trainer.datamodule.vocabulary = torch.tensor([ord(letter) for letter in "aéß"])
    with pytest.raises(InputError, match="does not know 2 of the text's symbols: 'é', 'ß'; remove them"):
        module.on_validation_start()
    module._trainer.datamodule.prompt = np.array([ord("é")])
    with pytest.raises(InputError, match="does not know 1 of the text's symbols: 'é'"):
        module.on_predict_start()
    for options in ({"temperature": 0.0}, {"dropout": 1.0}, {"init": "zeros"}):
        with pytest.raises(InputError, match=r"choose|dropped"):
            model(**options)


@pytest.mark.parametrize("network", ["lstm", "hyper_lstm"])
def test_writing_follows_the_models_odds_and_the_seed(network):
    module = model(network=network)
    module.on_fit_start()
    prompt = lines().symbols[0]
    trace, again = (module.generate(prompt, 15, torch.Generator().manual_seed(1)) for _ in range(2))
    assert trace.symbols == again.symbols
    assert trace.symbols[:10] == prompt.tolist()
    assert len(trace.symbols) == len(trace.bits) == len(trace.cells) == 25
    assert set(trace.symbols) <= set(module.vocabulary[:28].tolist())
    assert again.symbols != module.generate(prompt, 15, torch.Generator().manual_seed(2)).symbols
    with torch.no_grad():
        module.predictor.output.bias[28:] = -100.0  # of symbols that no text has: none is ever drawn
    trace = module.generate(prompt, 15)
    bits, _ = module.score(lines("".join(map(chr, trace.symbols)), 1, 24), None)
    assert trace.bits[0] is None
    assert sum(trace.bits[1:]) / 24 == pytest.approx(bits.item(), abs=1e-3)
    module.hparams.temperature = 1e-4
    cold = [module.generate(prompt, 5, torch.Generator().manual_seed(seed)).symbols for seed in range(3)]
    assert cold[0] == cold[1] == cold[2]


def test_the_change_of_the_weights_is_that_of_the_whole_matrices():
    module = model(num_layers=2, init="broken-symmetry")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    module.on_fit_start()
    symbols = lines().symbols[0]
    trace = module.generate(symbols, 0)
    assert trace.changes.shape == (10, 4)
    assert not trace.changes[0].any()
    cell, state, before = module.predictor.recurrent.cells[1], None, None
    for t, x in enumerate(module.encode(symbols)):
        _, state = module.predictor(x.view(1, 1), state)
        d_h = cell.scales(state[0][1, :, 7:])[0][0]
        matrices = d_h[..., None] * cell.weight_hh.unflatten(0, (4, 7))
        if before is not None:
            wanted = (matrices - before).flatten(1).norm(dim=1)
            torch.testing.assert_close(trace.changes[t].double(), wanted, rtol=1e-5, atol=1e-6)
        before = matrices
    assert model(network="lstm").generate(symbols[:1], 0).changes is None


def test_dynamic_evaluation_learns_from_what_it_has_scored(tmp_path):
    """On a text that repeats itself, and by plain gradient descent: the first segment costs what it costs anyway."""
    module, logged = model(dynamic_evaluation=0.5), []
    module.on_fit_start()
    module._log_bits = lambda name, bits, batch: logged.append(bits.item())
    module._sum = lambda x: x
    module._trainer.strategy = types.SimpleNamespace(reduce=lambda x, reduce_op: x)
    module.weights = {name: weight.detach().clone() for name, weight in module.predictor.named_parameters()}
    start, state = dict(module.weights), None
    for _ in range(3):
        state = module._learn(lines(), state)
        if len(logged) == 1:
            gradients = torch.autograd.grad(module.score(lines(), None)[0] * math.log(2), module.predictor.parameters())
            for (name, weight), gradient in zip(start.items(), gradients, strict=True):
                torch.testing.assert_close(module.weights[name], weight - 0.5 * gradient)
    assert logged[0] == pytest.approx(module.score(lines(), None)[0].item())
    assert logged[2] < logged[1] < logged[0]
    assert all(torch.equal(weight, start[name]) for name, weight in module.predictor.named_parameters())


def test_pictures():
    letters, bits = list("a\nb\tc") + ["é"] * 80, [None] + [8.0] * 84
    changes = torch.zeros(85, 4)
    changes[2:12, 2] = 4.0
    changes[1] = torch.tensor([1.0, 2.0, 40.0, 0.0])
    plain, coloured = annotated_text(letters, bits, None, 3), annotated_text(letters, bits, changes, 3)
    assert plain.dtype == torch.uint8
    assert plain.shape[2] == coloured.shape[2]
    assert plain.shape[1] < coloured.shape[1]
    colours = {tuple(colour) for colour in coloured.flatten(1).T.tolist()}
    assert tuple(round(255 - 1.0 * (255 - channel)) for channel in GATES["g"][1]) in colours, "the largest changes"
    assert tuple(round(255 - 0.25 * (255 - channel)) for channel in GATES["i"][1]) in colours
    assert GATES["o"][1] not in colours
    assert histogram(torch.tensor([-1.0, 0.5, 0.99])).shape == (3, 300, 400)


def test_the_users_text_from_fit_to_predict(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text(TEXT.upper())
    options = [*arguments("hyper_ptb", tmp_path), f"--data.text={tmp_path / 'mine.txt'}"]
    main(["fit", *options, "--model.network=lstm"])
    assert "mine.txt by characters" in capsys.readouterr().out
    main(["predict", *options, "--model.network=lstm", "--data.prompt=LAZY"])
    written = (tmp_path / "hyper_ptb" / "predictions" / "text.txt").read_text()
    assert written.startswith("LAZY")
    assert len(written) == 4 + 20 + 1
    with pytest.raises(SystemExit, match=r"error: the model does not know 1 of the text's symbols: 'z'"):
        main(["predict", *options, "--model.network=lstm", "--data.prompt=LAzY"])
    (tmp_path / "mine.txt").write_text(TEXT)
    with pytest.raises(SystemExit, match=r"error: the model does not know 26 of the text's symbols"):
        main(["test", *options, "--model.network=lstm"])
