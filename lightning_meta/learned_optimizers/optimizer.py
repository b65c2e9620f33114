"""A trained rule as a ``torch.optim.Optimizer``, and the files that such rules are kept in.

Shapes: n coordinates of one parameter, N of all that are updated together; L LSTM layers of H hidden units.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.layers import LearnedRule
from lightning_meta.storage import weights
from lightning_meta.storage.atomic import whole

WEIGHTS = Path(__file__).parent / "weights"  # the rules that come with the package
OPTIONS = ("separate_convolutions", "hidden_size", "num_layers", "p", "output_scale", "averaging_cells")


def read_rule(weights: str | Path) -> LearnedRule:
    """A trained rule, ready to be used: on the CPU, float32, nothing to be trained. No code in a file can run.

    Args:
        weights: The name of a rule that comes with the package, such as ``l2l_mnist``; or the path of a
            ``.safetensors`` file from ``write_rule`` or ``run.py catalogue``, or of a ``.ckpt`` that the command line
            wrote.

    Raises:
        InputError: Where there is no such rule, or the file is damaged or something else.
    """
    path = Path(weights)
    if path.suffix not in (".ckpt", ".safetensors"):
        shipped = sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))
        if str(weights) not in shipped:
            known = " or ".join([*shipped, "the path of a .safetensors or .ckpt file"])
            raise InputError(f"no learned optimizer {weights}: give {known}")
        path = WEIGHTS / f"{weights}.safetensors"
    if not path.is_file():
        raise InputError(f"no file {path}: check the path")
    try:
        options, tensors, fingerprint = (_from_checkpoint if path.suffix == ".ckpt" else _from_safetensors)(path)
        with torch.device("meta"):  # no memory, and no random numbers drawn from the caller's generator
            rule = LearnedRule(**{name: options[name] for name in OPTIONS})
        for value in _options(rule).values():
            float(value or 0)  # a text that got this far
    except InputError:
        raise
    except Exception as error:  # there is an exception for every way in which a file can be broken
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path} is not a learned optimizer or is damaged ({reason}): get it anew") from error
    _check_tensors(path, tensors, rule)
    rule.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
    if fingerprint not in (None, _fingerprint(rule)):
        raise InputError(f"{path} is damaged, its fingerprint is not that of its weights and options: get it anew")
    return rule.eval().requires_grad_(False)


Contents = tuple[Mapping[str, Any], dict[str, Tensor], str | None]  # options, weights, what _fingerprint said of them


def _from_checkpoint(path: Path) -> Contents:
    from lightning_meta.storage.checkpoints import read_checkpoint  # imports Lightning, which nothing else here needs

    return _contents(read_checkpoint(path))


def _contents(checkpoint: dict[str, Any]) -> Contents:
    tensors = {name[5:]: value for name, value in checkpoint["state_dict"].items() if name.startswith("rule.")}
    return checkpoint["hyper_parameters"], tensors, None


def _from_safetensors(path: Path) -> Contents:
    with safe_open(path, "pt") as file:
        notes = file.metadata() or {}
        if "notes" in notes:  # of a whole module
            return _contents(weights.read(path))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        return json.loads(notes["options"]), tensors, notes["fingerprint"]


def _check_tensors(path: Path, tensors: dict[str, Tensor], rule: LearnedRule) -> None:
    expected = {name: tensor.shape for name, tensor in rule.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{path}: there is no {name}, which a rule with its options has: get the file anew")
        if name not in expected:
            raise InputError(f"{path}: {name} is no weight of a rule with its options: get the file anew")
        there, here = tuple(tensors[name].shape), tuple(expected[name])
        if there != here:
            raise InputError(f"{path}: {name} is {there} and should be {here} by the file's options: get it anew")
        if not tensors[name].isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite: get the file or train anew")


def write_rule(path: str | Path, rule: LearnedRule, **notes: str) -> None:
    """Writes a rule, float32, for ``read_rule``. The file is whole or not there.

    Args:
        path: Ends in ``.safetensors``.
        rule: Its weights and options are written.
        notes: What else the file shall say of itself: data, steps, seed.

    Raises:
        InputError: Where the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"cannot write a rule to {path}: choose a name that ends in .safetensors")
    notes |= {"options": json.dumps(_options(rule)), "fingerprint": _fingerprint(rule)}
    with whole(path) as part:
        part.write_bytes(save(_weights(rule), notes))


def _options(rule: LearnedRule) -> dict[str, Any]:
    network = next(iter(rule.networks.values()))
    own = {"separate_convolutions": len(rule.networks) > 1, "num_layers": len(network.layers)}
    return {name: own[name] if name in own else getattr(network, name) for name in OPTIONS}


def _weights(rule: LearnedRule) -> dict[str, Tensor]:
    return {name: w.detach().to("cpu", torch.float32).clone() for name, w in rule.state_dict().items()}


def _fingerprint(rule: LearnedRule) -> str:
    """What two rules share that give the same updates, and no others do."""
    options = [value if value is None else float(value) for value in _options(rule).values()]
    digest = hashlib.sha256(json.dumps(options).encode())
    for name, weight in sorted(_weights(rule).items()):
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()[:16]


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Trains a model with a learned rule: :math:`\theta \leftarrow \theta + lr \cdot g`, g the rule's answer.

    To be used as any torch optimizer, with learning rate schedulers, ``GradScaler`` and Lightning. The rule carries a
    state of 2 L H numbers for every coordinate: 80 times the memory of the parameters with the paper's 2 layers of 20.
    It is computed in float32 (in float64 for float64 parameters), under autocast too. All parameters of a group that
    are on one device are updated in one call; averaging cells average over them.

    ``state_dict`` holds the states and not the rule's weights: load it into an optimizer with the same rule. A gradient
    that is infinite or not a number is taken as it is, as by torch's own optimizers: where it can occur, as in float16,
    let ``GradScaler`` skip the step, or a coordinate's state is lost with its value, and with averaging cells those
    of its whole group.

    Args:
        params: Tensors, named tensors or groups, as for any torch optimizer.
        weights: What ``read_rule`` takes, or a rule, which is copied.
        lr: Factor on the updates; 1 is how the rule was trained. Groups may have their own.

    Raises:
        InputError: Where the weights cannot be read or ``lr`` is not a factor.
    """

    def __init__(self, params: ParamsT, weights: str | Path | LearnedRule = "l2l_mnist", lr: float = 1.0):
        rule = copy.deepcopy(weights) if isinstance(weights, LearnedRule) else read_rule(weights)
        self.rule = rule.eval().requires_grad_(False)
        self._copies: dict[tuple[torch.device, torch.dtype], LearnedRule] = {}
        super().__init__(params, {"lr": lr, "fingerprint": _fingerprint(self.rule)})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule, "_copies": {}}  # torch's own leaves all else out

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        lr = param_group.get("lr", self.defaults["lr"]) if isinstance(param_group, dict) else 1.0
        if not lr >= 0:
            raise InputError(f"lr: {lr} is no factor on updates: choose 1, or another positive number")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; the others keep their value and state.

        Args:
            closure: Computes loss and gradients anew.

        Returns:
            What the closure returned.

        Raises:
            InputError: Where a gradient is sparse or complex; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = []
        for group in self.param_groups:
            together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is None or not parameter.numel():
                    continue
                if parameter.grad.layout is not torch.strided or parameter.is_complex():
                    kind = "complex" if parameter.is_complex() else "sparse"
                    raise InputError(f"{_name(group, i)} has {kind} gradients: give it to another optimizer")
                together.setdefault((parameter.device, _precision(parameter)), []).append(parameter)
            calls += [(group["lr"], parameters, *key) for key, parameters in together.items()]
        for call in calls:
            self._update(*call)
        return loss

    def _update(self, lr: float | Tensor, parameters: list[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = copy.deepcopy(self.rule).to(device, dtype)
        rule, shapes = self._copies[device, dtype], [parameter.shape for parameter in parameters]
        members: dict[str, list[dict[str, Tensor]]] = {}  # the states that each network continues
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                size = self._state_size(parameter)
                state |= {key: torch.zeros(size, dtype=dtype, device=device) for key in ("h", "c")}
            members.setdefault(rule.name_of(parameter.shape), []).append(state)
        before = {
            name: list(zip(*(torch.cat([state[key] for state in states], 1) for key in ("h", "c")), strict=True))
            for name, states in members.items()
        }
        gradients = torch.cat([p.grad.flatten().to(dtype) for p in parameters if p.grad is not None])
        with torch.autocast(device.type, enabled=False):
            updates, after = rule(gradients[None, None], before, shapes)
        for name, states in members.items():
            sizes = [state["h"].shape[1] for state in states]
            for key, layers in zip(("h", "c"), zip(*after[name], strict=True), strict=True):
                for state, value in zip(states, torch.stack(layers).split(sizes, 1), strict=True):
                    state[key].copy_(value)  # in place: a view would keep the memory of all parameters alive
        updates = updates.flatten().split([parameter.numel() for parameter in parameters])
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.add_(lr * update.view_as(parameter))

    def _state_size(self, parameter: Tensor) -> tuple[int, int, int]:
        options = _options(self.rule)
        return options["num_layers"], parameter.numel(), options["hidden_size"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the states and options of an optimizer with the same rule, for parameters of the same shapes.

        Args:
            state_dict: From ``state_dict``. It is copied.

        Raises:
            InputError: Where it belongs to another rule, other parameters or another kind of optimizer.
        """
        loaded = {}

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            self._check(state_dict)
            loaded.update(state_dict)

        def restore(optimizer: torch.optim.Optimizer) -> None:
            # torch has cast the states to the parameters' dtypes; bfloat16 would have lost most of their digits
            for index, parameter in _pairs(loaded, self.param_groups):
                if index in loaded["state"]:
                    self.state[parameter] = {
                        key: value.to(parameter.device, _precision(parameter), copy=True)
                        for key, value in loaded["state"][index].items()
                    }

        with (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _check(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        if any("fingerprint" not in group for group in groups):
            raise InputError("the state is that of another kind of optimizer: load it into one of that kind")
        own = self.defaults["fingerprint"]
        if other := {group["fingerprint"] for group in groups} - {own}:
            raise InputError(f"the state is that of rule {other.pop()}, not of {own}: give the same weights as then")
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise InputError("the state is that of other numbers of parameters or groups: give the same ones as then")
        names = [_name(group, i) for group in self.param_groups for i in range(len(group["params"]))]
        for name, (index, parameter) in zip(names, _pairs(state_dict, self.param_groups), strict=True):
            here = self._state_size(parameter)
            state = state_dict["state"].get(index, {})
            if state and {key: tuple(value.shape) for key, value in state.items()} != {"h": here, "c": here}:
                raise InputError(f"the state of {name} is not of shape {here}: give the same parameters as then")


def _precision(parameter: Tensor) -> torch.dtype:
    """Of the rule and its states: a half-precision parameter's own digits would not do for them."""
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32


def _pairs(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> list[tuple[int, Tensor]]:
    """The parameters and their numbers in a state dict."""
    both = zip(state_dict["param_groups"], groups, strict=True)
    return [pair for saved, group in both for pair in zip(saved["params"], group["params"], strict=True)]


def _name(group: dict[str, Any], i: int) -> str:
    return group["param_names"][i] if "param_names" in group else f"parameter {i} {tuple(group['params'][i].shape)}"
