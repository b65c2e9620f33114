"""A trained update rule as a ``torch.optim.Optimizer``.

Shapes: n coordinates of one parameter, N of all parameters that are updated together; L LSTM layers of H hidden units.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_meta.errors import InputError
from lightning_meta.learned_optimizers.layers import LearnedRule
from lightning_meta.storage.weights import find, read

OPTIONS = ("separate_convolutions", "hidden_size", "num_layers", "p", "output_scale", "averaging_cells")


def read_rule(weights: str | Path) -> LearnedRule:
    """Read a trained rule: on the CPU, float32, without gradients. No code in the file can run.

    Args:
        weights: The name of a rule that ships with the package, such as ``l2l_mnist``; or the path of a
            ``.safetensors`` file from ``run.py catalogue``, or of a ``.ckpt`` that the command line wrote.

    Raises:
        InputError: If there is no such rule, or the file is damaged or something else.

    >>> read_rule("l2l_mnist").networks["all"].output
    Linear(in_features=20, out_features=1, bias=True)
    """
    path = find(weights)
    if not path.is_file():
        raise InputError(f"no file {path}: check the path")
    try:
        options, tensors, fingerprint = _contents(path)
        with torch.device("meta"):  # sizes are compared before they take memory; the caller's generator is not used
            rule = LearnedRule(**{name: options[name] for name in OPTIONS})
        rule.load_state_dict(tensors, assign=True)
        rule = copy.deepcopy(rule).float()  # the tensors may be mapped from the file
        if bad := [name for name, weight in rule.state_dict().items() if not weight.isfinite().all()]:
            raise ValueError(f"{bad[0]} has values that are not finite")
        if fingerprint not in (None, _fingerprint(rule)):
            raise ValueError("its fingerprint does not match its weights and options")
    except InputError:
        raise
    except Exception as error:  # a broken file can raise any exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path} is not a learned optimizer or is damaged ({reason:.300}): copy or download it again"
        ) from error
    return rule.eval().requires_grad_(False)


def _contents(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor], str | None]:
    """Return a rule's options, weights and, if the file has one, the fingerprint of both."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "options" in metadata:  # an older file, of a rule without the module that trained it
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
                return json.loads(metadata["options"]), tensors, metadata["fingerprint"]
        checkpoint = read(path)
    else:
        from lightning_meta.storage.checkpoints import read_checkpoint  # imports Lightning; nothing else here needs it

        checkpoint = read_checkpoint(path)
    tensors = {name[5:]: value for name, value in checkpoint["state_dict"].items() if name.startswith("rule.")}
    return checkpoint["hyper_parameters"], tensors, None


def _options(rule: LearnedRule) -> dict[str, Any]:
    """Return the arguments of ``LearnedRule`` that make a rule of the same architecture."""
    network = next(iter(rule.networks.values()))
    own = {"separate_convolutions": len(rule.networks) > 1, "num_layers": len(network.layers)}
    return {name: own[name] if name in own else getattr(network, name) for name in OPTIONS}


def _fingerprint(rule: LearnedRule) -> str:
    """Hash of options and weights: equal exactly for rules that produce the same updates."""
    options = [value if value is None else float(value) for value in _options(rule).values()]
    digest = hashlib.sha256(json.dumps(options).encode())
    for name, weight in sorted(rule.state_dict().items()):
        digest.update(name.encode() + weight.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Train a model with a learned rule: :math:`\theta \leftarrow \theta + lr \cdot g`, where g is the rule's output.

    The rule is the network m of Andrychowicz et al. 2016, section 2. Use this class as any torch optimizer, with
    learning rate schedulers, ``GradScaler`` and Lightning. The shipped rules were trained on quadratics, on a small
    sigmoid network and on style transfer (see their cards); on other problems, such as networks with ReLU, they can
    diverge.

    The rule keeps a state of 2 L H numbers for each coordinate. With the paper's two layers of 20 units that is 320
    bytes for each parameter, and about 1.5 kB during a step. The rule computes in float32 (in float64 for float64
    parameters), under autocast too. All parameters of a group that are on one device are updated in one call, and
    averaging cells average over them.

    ``state_dict`` holds the states but not the rule's weights: load it into an optimizer with the same rule.
    Like torch's own optimizers, this one does not check for gradients that are infinite or NaN. Such a gradient spoils
    the value and the state of its coordinate, and with averaging cells those of the whole group. If it can occur, as
    in float16, let ``GradScaler`` skip the step.

    Args:
        params: Tensors, named tensors or groups, as for any torch optimizer.
        weights: Name or path of a rule, see ``read_rule``; or a rule, which is copied.
        lr: Factor on the updates, 1 in meta-training. Groups can have their own.

    Raises:
        InputError: If the weights cannot be read or ``lr`` is negative or NaN.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = LearnedOptimizer(model.parameters(), weights="l2l_mnist", lr=0.1)
    >>> model(torch.ones(2, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.state[model.weight]["h"].shape  # layers, coordinates, units
    torch.Size([2, 3, 20])
    """

    def __init__(self, params: ParamsT, weights: str | Path | LearnedRule = "l2l_mnist", lr: float = 1.0):
        rule = copy.deepcopy(weights) if isinstance(weights, LearnedRule) else read_rule(weights)
        self.rule = rule.eval().requires_grad_(False)
        self._copies: dict[tuple[torch.device, torch.dtype], LearnedRule] = {}
        super().__init__(params, {"lr": lr, "fingerprint": _fingerprint(self.rule)})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule, "_copies": {}}  # torch's own omits other attributes

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        lr = param_group.get("lr", self.defaults["lr"]) if isinstance(param_group, dict) else 1.0
        if not lr >= 0:
            raise InputError(f"lr: {lr} must not be negative or NaN: choose 1, or another positive number")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; the others keep their value and state.

        Args:
            closure: Function that computes the gradients again and returns the loss.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            InputError: If a gradient is sparse or complex. No parameter has changed then.
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
                    raise InputError(f"{_name(group, i)} has {kind} gradients: use another optimizer for it")
                together.setdefault((parameter.device, _precision(parameter)), []).append(parameter)
            calls += [(group["lr"], parameters, *key) for key, parameters in together.items()]
        for call in calls:
            self._update(*call)
        return loss

    def _update(self, lr: float | Tensor, parameters: list[Tensor], device: torch.device, dtype: torch.dtype) -> None:
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = copy.deepcopy(self.rule).to(device, dtype)
        rule, shapes = self._copies[device, dtype], [parameter.shape for parameter in parameters]
        members: dict[str, list[dict[str, Tensor]]] = {}  # by network: the states of its parameters
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
        """Load states and options of an optimizer with the same rule and parameters of the same shapes.

        Args:
            state_dict: Return value of ``state_dict``. It is copied.

        Raises:
            InputError: If it belongs to another rule, other parameters or another kind of optimizer.
        """
        loaded = {}

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            self._check(state_dict)
            loaded.update(state_dict)

        def restore(optimizer: torch.optim.Optimizer) -> None:
            # torch casts the states to the parameters' dtype; in bfloat16 they would lose most of their digits
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
            raise InputError("the state dict is from another kind of optimizer: load it into one of that kind")
        own = self.defaults["fingerprint"]
        if other := {group["fingerprint"] for group in groups} - {own}:
            raise InputError(f"the state dict is from rule {other.pop()}, this is {own}: use the weights of that run")
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise InputError("the state dict has other numbers of parameters or groups: use the model of that run")
        names = [_name(group, i) for group in self.param_groups for i in range(len(group["params"]))]
        for name, (index, parameter) in zip(names, _pairs(state_dict, self.param_groups), strict=True):
            here = self._state_size(parameter)
            state = state_dict["state"].get(index, {})
            if state and {key: tuple(value.shape) for key, value in state.items()} != {"h": here, "c": here}:
                raise InputError(f"the state of {name} should be h and c of shape {here}: use the model of that run")


def _precision(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's states: half precision would be too coarse for them."""
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32


def _pairs(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> list[tuple[int, Tensor]]:
    """Return each parameter with its number in a state dict."""
    both = zip(state_dict["param_groups"], groups, strict=True)
    return [pair for saved, group in both for pair in zip(saved["params"], group["params"], strict=True)]


def _name(group: dict[str, Any], i: int) -> str:
    return group["param_names"][i] if "param_names" in group else f"parameter {i} {tuple(group['params'][i].shape)}"
