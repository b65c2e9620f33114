"""`python run.py fit|validate|test|predict --config configs/NAME.yaml`, `... results` and `... catalogue`."""

import gc

gc.disable()  # looking for garbage among the many objects that imports leave costs a tenth of the start
from lightning_meta.cli import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    main()
