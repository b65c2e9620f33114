"""The command line in a clone: ``lightning_meta``'s commands, and ``results``."""

from lightning_meta.__main__ import main

if __name__ == "__main__":
    from lightning_meta.cli import Command
    from tools import results

    main(
        commands={
            "results": Command("write the tables and plots of the pages from the records in results/", results.main)
        }
    )
