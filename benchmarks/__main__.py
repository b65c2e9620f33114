"""Run one benchmark, or all that take minutes: ``python -m benchmarks [name] [options of the benchmark]``."""

import importlib
import pkgutil
import sys

import benchmarks


def main(arguments: list[str]) -> None:
    names = sorted({module.name for module in pkgutil.iter_modules(benchmarks.__path__)} - {"__main__", "report"})
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    if arguments and arguments[0] in modules:
        modules[arguments[0]].main(arguments[1:])
    elif arguments:
        print("usage: python -m benchmarks [name] [options]\n\nWithout a name, all but those that take hours:")
        for name, module in modules.items():
            print(f"  {name:20s} {module.__doc__.splitlines()[0]}")
        print("\nNAME --help for options")
        if arguments[0] not in ("-h", "--help"):
            sys.exit(f"error: expected one of {', '.join(names)}, got {arguments[0]!r}: choose one of these")
    else:
        for module in modules.values():
            if not getattr(module, "ONLY_BY_NAME", False):
                module.main([])


if __name__ == "__main__":
    main(sys.argv[1:])
