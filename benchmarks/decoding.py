"""A translator's beam search, 32 sentences at once, against greedy search, and against one sentence at a time.

The weights are random, so no sentence ends early: each gets the largest number of subwords.
"""

import argparse
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.report import parse, report, seconds
from lightning_meta.hypernetworks.recurrent import Network
from lightning_meta.hypernetworks.translator import Translator
from lightning_meta.sources.subwords import EOS, UNKNOWN


class Setting(NamedTuple):
    """The size of a translator, and of what it translates."""

    name: str
    network: Network
    pieces: int
    hidden: int
    hyper: int
    embedding: int
    length: int  # pieces of a sentence and of its translation
    sentences: int = 32
    beam: int = 4


SETTINGS = [
    Setting(f"{size}, {network}", network, *sizes)
    for size, sizes in {"numbers": (200, 128, 32, 8, 16), "captions": (4000, 256, 64, 16, 20)}.items()
    for network in ("lstm", "hyper_lstm")
]


def measure(setting: Setting, options: argparse.Namespace) -> list[dict[str, str | float]]:
    name, network, pieces, hidden, hyper, embedding, length, sentences, beam = setting
    torch.manual_seed(0)
    cells = {"layer_norm": True, "hyper_size": hyper, "embedding_size": embedding}
    translator = Translator(pieces, hidden // 2, hidden, network=network, **cells).to(options.device).eval()
    torch.nn.init.constant_(translator.decoder.output.bias[EOS : EOS + 1], -100)
    source = torch.randint(UNKNOWN + 1, pieces, (length, sentences), device=options.device)
    source[-1] = EOS
    longest = torch.full((sentences,), length, device=options.device)

    forms = {  # beam, sentences at once
        "greedy": (1, sentences),
        f"beam of {beam}": (beam, sentences),
        f"beam of {beam}, one at a time": (beam, 1),
    }
    times = {form: [] for form in forms}
    for _ in range(options.repeats + 1):  # interleaved, so that a busy moment hits all of them; the first warms up
        for form, (width, n) in forms.items():
            run = partial(translator.beam_search, source[:, :n], longest[:n], width)
            times[form].append(seconds(run, options.device) / n)
    best = {form: min(each[1:]) for form, each in times.items()}
    return [
        {
            "setting": name,
            "form": form,
            "sentences/s": 1 / best[form],
            "x time of greedy": best[form] / best["greedy"],
        }
        for form in forms
    ]


def main(arguments: list[str]) -> None:
    options = parse("decoding", __doc__, arguments)
    report("decoding", [row for setting in SETTINGS for row in measure(setting, options)], options)
