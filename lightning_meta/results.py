"""`python run.py results`: the README's tables, made from the records under ``results/``."""

import json
from pathlib import Path
from typing import Any

import yaml

from lightning_meta.errors import InputError

ROOT = Path(__file__).parents[1]
