"""The command line as a program: ``lightning-meta``, ``python -m lightning_meta``, and ``run.py`` in a clone."""

import gc

gc.disable()  # the imports make many objects, and looking for garbage among them costs a tenth of the start-up time
from lightning_meta.cli import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    main()
