"""Run one benchmark, or all: ``python -m benchmarks [name] [options of the benchmark]``."""

import argparse
import importlib
import pkgutil

import benchmarks


def main() -> None:
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_"))
    lines = [f"  {name:20s} {importlib.import_module(f'benchmarks.{name}').__doc__.splitlines()[0]}" for name in names]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run one benchmark, or all.",
        epilog="benchmarks:\n" + "\n".join(lines) + "\n\nOptions after the name go to the benchmark: NAME --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", choices=names, help="all, if not given")
    arguments, options = parser.parse_known_args() if not _has_name(names) else (None, None)
    if arguments is None:
        import sys

        at = next(i for i, word in enumerate(sys.argv) if word in names)
        importlib.import_module(f"benchmarks.{sys.argv[at]}").main(sys.argv[at + 1 :])
        return
    for name in names:
        importlib.import_module(f"benchmarks.{name}").main(options)


if __name__ == "__main__":
    main()
