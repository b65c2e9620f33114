"""`python run.py fit|validate|test|predict --config configs/NAME.yaml`, and `python run.py results`."""

from lightning_meta.cli import main

if __name__ == "__main__":
    main()
