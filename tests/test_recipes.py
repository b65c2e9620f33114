"""Every default recipe, shortened to seconds, against the baselines of its table.

Models have the recipe's sizes, data are real where there are real ones, and baselines are as strong as after a whole
run: texts are compressed whole, and hand-made rules have the rates that the whole run chose for them. The precision is
32-true, which gives about the same numbers on every machine.
"""

import json
import os
import shlex
from pathlib import Path

import pytest

from lightning_meta.cli import main
from tests.conftest import CONFIGS, DRAWN, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DATA = Path(os.environ.get("LIGHTNING_META_DATA", "no-data"))
STAND_INS = {"dfn_steerable", "hyper_translation"}  # of whose data there are no real ones
L2L = "--data.tests={} --data.val_problems=1 --data.tune_problems=1"
TEXT = "--data.readers=256 --data.val_symbols=5000 --model.dynamic_evaluation=null"
CIFAR = f"--data.pictures={DATA}/cifar10/cifar10_lossless.tar.xz"

# Steps and options. The comments have the measured value, the nearest baselines, and seconds of one CPU.
SHORT = {
    # 4.204, copy the last frame 5.107; 45 s
    "dfn_highway": (1000, "--data.batch_size=1 --data.val_sequences=4"),
    # 767.5, mean frame 680.0, copy the last frame 3,270; 8 s
    "dfn_mnist": (20, "--schedule.horizon=10 --data.batch_size=4 --data.val_sequences=4 --data.test_sequences=50"),
    # 4.38, nearest of 8 filters 17.41; 7 s
    "dfn_steerable": (1200, "--data.val_patches=64 --data.test_patches=500"),
    # 55.57, copy the left view 122.9; 5 s
    "dfn_stereo": (100, "--data.batch_size=4 --data.val_pairs=16"),
    # 77.2, linear classifier 59.6, chance 90; 47 s, of which 19 read the pictures
    "hyper_cifar10": (150, f"{CIFAR} --data.val_pictures=100 --data.test_pictures=1000"),
    # 2.793, xz 2.558, gzip 2.901; 43 s
    "hyper_enwik8": (600, f"{TEXT} --data.text={DATA}/text/enwik8.first4154064.gz --data.batch_size=8"),
    # 613.5, one mixture for all points 924.7; 35 s, of which 15 read the strokes
    "hyper_handwriting": (50, "--data.batch_size=16 --data.val_sequences=20 --data.test_sequences=50"),
    # 2.53, linear classifier 7.77; 10 s
    "hyper_mnist": (300, "--data.val_pictures=500"),
    # 2.066, xz 2.237; 43 s
    "hyper_ptb": (450, f"{TEXT} --data.batch_size=16"),
    # 1.882, unigram entropy 3.054; 11 s
    "hyper_translation": (80, "--data.val_pairs=50 --data.test_pairs=100"),
    # 2.180, NAG 1.744, SGD 1.858, no step 2.300; 59 s, of which 19 read the pictures
    "l2l_cifar10": (30, f"{CIFAR} {L2L} --schedule.horizon=100 --data.test_problems=2"),
    # 0.639, NAG 0.280, RMSprop 0.394, no step 2.302; 28 s
    "l2l_mnist": (60, f"{L2L} --schedule.horizon=100 --data.test_problems=4"),
    # 0.220, Adam 0.357; 20 s
    "l2l_quadratic": (800, f"{L2L} --schedule.horizon=100 --data.batch_size=64 --data.test_problems=512"),
    # 1.211, Adam 1.042, NAG 1.127, RMSprop 1.330; 19 s
    "l2l_style": (30, L2L),
    # 65.25, nearest picture 81.25; 24 s
    "learnet_omniglot": (160, "--data.tests={} --data.val_episodes=5 --data.test_episodes=40"),
    # 2.28, the object stays where it was 38.72; 11 s
    "learnet_tracking": (
        40,
        f"--data.sequences={DATA}/tracking/otb/Dudek20 --data.val_triplets=8 --data.test_triplets=128",
    ),
}
RATES = {  # that the records in results/ chose
    "l2l_cifar10": "{SGD: [0.1], NAG: [0.03], RMSprop: [0.01], Adam: [0.03]}",
    "l2l_mnist": "{SGD: [3.0], NAG: [1.0], RMSprop: [0.01], Adam: [0.03]}",
    "l2l_quadratic": "{SGD: [0.01], NAG: [0.01], RMSprop: [0.03], Adam: [0.3]}",
    "l2l_style": "{SGD: [3.0], NAG: [1.0], RMSprop: [0.003], Adam: [0.03]}",
}

# Baselines that no run of a minute is ahead of with today's recipes, and what was measured. A recipe that gets ahead of
# one fails its test until the baseline is removed here.
BEHIND = {
    "dfn_mnist": {"mean frame": "767.5 nats a frame against 680.0"},
    "hyper_cifar10": {"linear classifier": "77.2 % error against 59.6 %"},
    "hyper_enwik8": {"xz": "2.793 bits against 2.558; 2.665 after 800 steps"},
    "l2l_cifar10": {
        "SGD 0.1": "2.180 nats against 1.858",
        "NAG 0.03": "2.180 nats against 1.744",
        "RMSprop 0.01": "2.180 nats against 1.786",
        "Adam 0.03": "2.180 nats against 1.794",
    },
    "l2l_mnist": {
        "SGD 3": "0.639 nats against 0.393",
        "NAG 1": "0.639 nats against 0.280; 0.460 after 120 steps",
        "RMSprop 0.01": "0.639 nats against 0.394",
        "Adam 0.03": "0.639 nats against 0.318",
    },
    "l2l_style": {
        "NAG 1": "1.211 against 1.127; 1.142 after 60 steps",
        "Adam 0.03": "1.211 against 1.042",
    },
}

# Untrained, these networks are ahead of some baselines already, at 779.0, 115.2 and 88.9. They have to get below these
# numbers, too.
UNTRAINED = {"dfn_mnist": 775.0, "dfn_stereo": 110.0, "hyper_cifar10": 86.0}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_short_run_is_ahead_of_its_baselines(name, tmp_path, request):
    data = []
    if name in STAND_INS:
        data = ["--data.source=stand-in"]
    elif name not in DRAWN:
        data = [f"--data.root={request.getfixturevalue('real_data')}"]
    if name in RATES:
        data.append(f"--model.baselines={RATES[name]}")
    steps, options = SHORT[name]
    main(
        [
            *("fit", f"--config={ROOT / 'configs' / name}.yaml", *data, *shlex.split(options)),
            *(f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"),
            *("--trainer.precision=32-true", "--timer.duration=null", f"--last.every_n_steps={steps}"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            f"--trainer.logger.init_args.save_dir={tmp_path}",
        ]
    )
    record = json.loads((tmp_path / name / "results.json").read_text())
    assert record["steps"] == steps
    value, baselines, behind = record["value"], record["baselines"], BEHIND.get(name, {})
    if name in UNTRAINED:
        baselines["untrained network"] = UNTRAINED[name]
    shares = ", ".join(f"{value / other:.2f} of {baseline} ({other:.4g})" for baseline, other in baselines.items())
    assert {baseline for baseline, other in baselines.items() if not value < other} == behind.keys(), (
        f"{value:.4g} after {steps} steps is {shares}"
    )
    if behind:
        pytest.xfail("; ".join(f"{baseline}: {measured}" for baseline, measured in behind.items()))
