import types

import pytest
import torch
import yaml

from lightning_meta.cli import main
from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.translation import Translation
from lightning_meta.hypernetworks.translation_data import PairDataset, Sentences
from lightning_meta.hypernetworks.translation_figures import attention_image
from lightning_meta.running.segments import Segment
from lightning_meta.sources.parallel_text import number_words
from lightning_meta.sources.subwords import EOS, PAD, Subwords, train_subwords
from tests.conftest import ROOT, arguments

LETTERS = ("abcdefgh", "ijklmnop")  # of a language and of another
SIZES = {"pieces": 90, "hidden_size": 8, "piece_size": 6, "encoder_layers": 2, "decoder_layers": 2, "hyper_size": 4}


@pytest.fixture(scope="module")
def numbers():
    return number_words(200, 10)


def model(numbers, **options):
    torch.manual_seed(0)
    module = Translation(**SIZES | {"embedding_size": 2, "dropout": 0.0} | options).eval()
    module.vocabulary = Subwords(train_subwords(numbers.train, 90, byte_fallback=False))
    return module


def batch(module, part, size=5):
    dataset = PairDataset(part, module.vocabulary)
    return Sentences.collate([dataset[(i, Segment(0, 0, 1, True))] for i in range(size)])


def test_the_loss_is_of_whole_sentences_and_the_measure_of_pieces(numbers):
    module, logged = model(numbers).double(), {}
    module.log = lambda name, value, **options: logged.update({name: value})
    some = batch(module, numbers.train)
    loss = module.training_step(some, 0)
    nats = module.translator(some.source, some.target)
    assert loss.item() == pytest.approx(nats.sum().item() / 5)
    halves = [
        module.training_step(some._replace(source=some.source[:, part], target=some.target[:, part]), 0)
        for part in (slice(0, 1), slice(1, 5))
    ]
    assert loss.item() == pytest.approx((halves[0] + 4 * halves[1]).item() / 5), "however sentences are shared"
    module._log_cost("val", some)
    pieces = int((some.target != PAD).sum())
    assert logged["val/log_perplexity"].compute().item() == pytest.approx(nats.sum().item() / pieces)


def test_translates_in_any_order_as_one_by_one(numbers):
    module = model(numbers, beam=3)
    sentences = numbers.test.source[:5]
    found = module.translate(sentences, batch_size=2)
    for sentence, translated in zip(sentences, found, strict=True):
        (alone,) = module.translate([sentence])
        assert translated.text == alone.text
        assert translated.target == alone.target
        assert translated.source[-1] == translated.target[-1] == "</s>"
        assert "".join(translated.source[:-1]).replace("\u2581", " ").strip() == sentence
        assert translated.attention.shape == (len(translated.target), len(translated.source))
        torch.testing.assert_close(translated.attention.sum(1), torch.ones(len(translated.target)))
        assert len(translated.target) <= 2 * len(translated.source) + 10


def test_the_pieces_are_part_of_the_checkpoint(numbers):
    module, checkpoint, other = model(numbers), {}, Translation(**SIZES)
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["pieces"].dtype == torch.uint8
    other.on_load_checkpoint(checkpoint)
    assert other.vocabulary.model == module.vocabulary.model
    other._trainer = types.SimpleNamespace(datamodule=None)
    other.on_fit_start()  # learns no others


def test_attention_is_drawn_with_its_pieces():
    weights = torch.zeros(3, 6)
    weights[0, 1] = 1
    picture = attention_image(weights, ["a", "longer", "b", "c", "$d", "</s>"], ["x", "y", "</s>"])
    assert picture.dtype == torch.uint8
    colours = {tuple(colour) for colour in picture.flatten(1).t().tolist()}
    assert any(blue > 80 and red < 20 for red, _, blue in colours), "the full colour"
    wider = attention_image(torch.zeros(3, 9), [*"abcdefghi"], ["x", "y", "</s>"])
    assert wider.shape[2] > picture.shape[2]
    assert picture.shape[1] > wider.shape[1], "longer pieces need more room"


@pytest.mark.parametrize(
    "options",
    [{"beam": 0}, {"pieces": 4}, {"piece_size": 0}, {"hidden_size": 0}, {"encoder_layers": 1}, {"dropout": 1.0}],
)
def test_options_that_do_not_fit(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Translation(**SIZES | options)


def test_the_users_files_from_fit_to_predict(tmp_path, capsys):
    """A language of eight words and another, that are translated word by word: it learns to say them."""
    random = torch.Generator().manual_seed(0)
    picks = [torch.randint(8, (3,), generator=random).tolist() for _ in range(400)]
    for name, letters in zip(("mine", "yours"), LETTERS, strict=True):
        (tmp_path / name).write_text("".join(" ".join(letters[k] for k in pick) + "\n" for pick in picks))
    options = [
        *arguments("hyper_translation", tmp_path),
        *(f"--data.source_file={tmp_path / 'mine'}", f"--data.target_file={tmp_path / 'yours'}"),
        *("--model.network=lstm", "--model.pieces=36", "--model.hidden_size=32", "--model.piece_size=16"),
        *("--model.encoder_layers=2", "--model.decoder_layers=2", "--model.lr=0.01", "--data.train_pairs=null"),
    ]
    long = ["--trainer.max_steps=150", "--trainer.val_check_interval=150", "--data.batch_size=16"]
    main(["fit", *options, *long, "--last.every_n_steps=100"])
    assert "mine and yours, 90/5/5 %" in capsys.readouterr().out
    (tmp_path / "text").write_text("a b c\nh g f\n")
    main(["predict", *options, f"--data.text={tmp_path / 'text'}", f"--data.source_file={tmp_path / 'gone'}"])
    folder = tmp_path / "hyper_translation" / "predictions"
    assert (folder / "translations.txt").read_text() == "a b c\ti j k\nh g f\tp o n\n"
    assert (folder / "attention_2.png").exists()
    with pytest.warns(UserWarning, match="some characters are unknown"):
        main(["predict", *options, "--data.text=a ß"])
    (tmp_path / "text").write_text("a b c\n\n")
    with pytest.raises(SystemExit, match=r"error: .*text: line 2 is empty"):
        main(["predict", *options, f"--data.text={tmp_path / 'text'}"])
    with pytest.raises(SystemExit, match=r"error: model.pieces: the texts are too small for 5,000 pieces"):
        main(["fit", *options, "--model.pieces=5000"])


def test_the_papers_sizes_are_gnmts():
    base = yaml.safe_load((ROOT / "configs" / "hyper_translation.yaml").read_text())["model"]["init_args"]
    paper = yaml.safe_load((ROOT / "configs" / "paper" / "hyper_translation.yaml").read_text())["model"]["init_args"]
    with torch.device("meta"):
        module = Translation(**base | paper)
    H, S, Z, V = 1024, 128, 32, 32_000

    def hyper_lstm(inputs):  # equation by equation, with layer norm
        small = 4 * S * (H + inputs + S + 1)
        return 4 * H * (H + inputs + 1) + small + 4 * (3 * S * Z + 2 * Z) + 12 * H * Z + 10 * (H + S)

    encoder = 2 * hyper_lstm(H) + hyper_lstm(2 * H) + 6 * hyper_lstm(H)
    decoder = hyper_lstm(H) + 7 * hyper_lstm(2 * H) + (2 * H * H + 2 * H) + V * (H + 1)
    assert sum(weight.numel() for weight in module.parameters()) == encoder + decoder + 2 * V * H


def test_the_end_of_a_sentence_ends_its_text(numbers):
    module = model(numbers)
    (text,) = numbers.test.source[:1]
    pieces = [*module.vocabulary.encode([text])[0], EOS, PAD]
    found = types.SimpleNamespace(subwords=torch.tensor(pieces)[:, None])
    assert module._texts(found) == [text]
