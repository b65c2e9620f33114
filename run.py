"""The command line, in a clone: ``python run.py fit|validate|test|predict --config configs/NAME.yaml``."""

from lightning_meta.__main__ import main

if __name__ == "__main__":
    main()
