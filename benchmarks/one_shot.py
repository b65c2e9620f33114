"""Train every one-shot network and metric in the same way, beside the paper's table 1. It takes hours.

    python -m benchmarks one_shot [options] [-- options of every ``python run.py fit``]

The paper's networks are trained with its logistic loss on pairs, a prototypical network with soft-max. A finished run
is not repeated and a stopped run is resumed: give the same options, or another --out.
"""

import argparse
import json
import shutil
import sys
import time
import warnings
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from lightning_meta import cli

ONLY_BY_NAME = True
CONFIG = "configs/learnet_omniglot.yaml"
PAPER = [  # its networks, and pairs of one alphabet, 25 an episode
    *("--model.trunk=paper", "--schedule.ways=5", "--schedule.queries=1"),
    *("--data.batch_size=8", "--data.rotations=false", "--data.augment=0"),
]
METRICS = ("inner_product", "euclidean", "weighted_l1")
TABLE_1 = {  # error in %, by metric; "?" is from memory
    "siamese": ("48.5 ?", "37.3 ?", "41.8"),
    "unshared": ("47.0 ?", "41.0 ?", "34.6"),
    "factorised": ("48.4 ?", "did not converge ?", "33.6"),
    "siamese_learnet": ("51.0 ?", "39.8 ?", "31.4"),
    "learnet": ("43.7 ?", "36.7 ?", "28.6"),
}
PUBLISHED = {
    **{
        (variant, metric): error for variant in TABLE_1 for metric, error in zip(METRICS, TABLE_1[variant], strict=True)
    },
    ("prototypical", "squared_euclidean"): "",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks one_shot",
        description=__doc__.splitlines()[0],
        epilog="What follows -- goes to every fit, such as: -- --model.trunk deep",
    )
    parser.add_argument(
        "--steps", type=int, help="of each run; the learning rate falls along them (default: as configured)"
    )
    parser.add_argument(
        "--seconds", type=int, help="of training after which a run ends before that (default: as configured)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=[*TABLE_1, "prototypical"], help="these variants")
    parser.add_argument("--root", default="data", help="folder with omniglot-py/")
    parser.add_argument("--out", type=Path, default=Path("runs/one_shot"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, help="copy the records there, such as results")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.fit = arguments[end + 1 :]
    return options


def command(variant: str, metric: str, folder: Path, seed: int, options: argparse.Namespace) -> list[str]:
    """Arguments of the fit that leaves its record in ``folder``; the user's own may change all but what it is."""
    loss = "softmax" if variant == "prototypical" else "logistic"
    limits = []
    if options.steps:
        limits = [f"--trainer.max_steps={options.steps}", "--timer.duration=null"]
    if options.seconds:
        days, rest = divmod(options.seconds, 24 * 60 * 60)
        limits += [f"--timer.duration={days:02d}:{time.strftime('%H:%M:%S', time.gmtime(rest))}"]
    return [
        *("fit", "--config", CONFIG, *PAPER, f"--model.loss={loss}", *options.fit),
        *(f"--model.variant={variant}", f"--model.metric={metric}", f"--data.root={options.root}", *limits),
        *(f"--trainer.logger.init_args.save_dir={folder.parent}", f"--trainer.logger.init_args.name={folder.name}"),
        *(f"--seed_everything={seed}", "--ckpt_path=last"),
    ]


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")  # as it does here
    chosen = [run for run in PUBLISHED if not options.only or run[0] in options.only]
    records, stopped = {run: [] for run in chosen}, 0
    for seed in options.seeds:
        for variant, metric in chosen:
            name = f"learnet_omniglot_{variant}_{metric}"
            record = options.out / f"seed_{seed}" / name / "results.json"
            if not record.exists():
                print(f"\n{name}, seed {seed}", flush=True)
                try:
                    cli.main(command(variant, metric, record.parent, seed, options))
                except SystemExit as stop:  # a line of text: what went wrong, such as a loss that is not a number
                    if not isinstance(stop.code, str):
                        raise
                    print(stop.code, file=sys.stderr, flush=True)
                    stopped += 1
                    continue
            records[variant, metric].append(json.loads(record.read_text()))
            if options.json:
                options.json.mkdir(parents=True, exist_ok=True)
                suffix = f"_{seed}" if len(options.seeds) > 1 else ""
                shutil.copyfile(record, options.json / f"{name}{suffix}.json")
    show(records)
    if stopped:
        sys.exit(f"error: {stopped} run{'s' * (stopped > 1)} stopped, see above; the same command runs what is missing")


def show(records: dict[tuple[str, str], list[dict]]) -> None:
    """Prints the errors of the first test case, means over seeds, beside the published ones.

    The steps and minutes are those of the best checkpoint, which is the one that is tested.
    """
    titles = {f"{r['measure']}: {r['data']}" for runs in records.values() for r in runs}
    table = Table(
        "variant", "metric", "error, %", "published", "best at step", "minutes", title="\n".join(sorted(titles))
    )
    for (variant, metric), runs in records.items():
        errors = [run["value"] for run in runs]
        each = f" ({', '.join(f'{error:.1f}' for error in errors)})" if len(errors) > 1 else ""
        ours = [f"{mean(errors):.1f}{each}"] if errors else ["stopped"]
        spent = (
            [f"{mean(r['steps'] for r in runs):,.0f}", f"{mean(r['seconds'] for r in runs) / 60:.1f}"] if runs else []
        )
        table.add_row(variant, metric.replace("_", " "), *ours, PUBLISHED[variant, metric], *spent)
    Console(width=120).print(table)
