"""Observe the inputs and outputs of named modules, all of them in one forward pass, without changing anything."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.spec.errors import NotFinite, NotFoundError, nearest

OnTensor = Callable[[str, Tensor], None]


class Eye:
    """What is shared by all hooks of one observation. Set `mask` [batch, time] (1 = token) before a padded forward."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._raw: Tensor | None = None
        self._flat: Tensor | None = None

    def tokens(self, value: Tensor) -> Tensor:
        """Return [batch, time, features] as [tokens, features] without padding; the same object for the same tensor.

        Layers that share an input (query, key and value) thus share what is computed from it. A tensor whose
        leading axes are not those of the mask (tokens routed to an expert) is only flattened.
        """
        if self._raw is value and self._flat is not None:
            return self._flat
        real = real_tokens(value.detach(), self.mask) if self.mask is not None else None
        flat = value.detach().flatten(0, -2) if real is None else real
        self._raw, self._flat = value, flat
        return flat

    def forget(self) -> None:
        """Drop the last tensor seen."""
        self._raw = self._flat = None


def real_tokens(value: Tensor, mask: Tensor) -> Tensor | None:
    """Return the real tokens [n, features] of a stream, wherever the mask's [batch, time] stands among its axes.

    Hyper-connections put streams behind them, Gemma-3n before. None where no two axes are like the mask's.
    """
    at = next((i for i in range(value.ndim - 2) if value.shape[i : i + 2] == mask.shape), None)
    if at is None:
        return None
    return value.movedim((at, at + 1), (0, 1))[mask.bool().to(value.device)].flatten(0, -2)


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Call `hook(module, args, kwargs, output)` after every forward of each named module, inside the `with`."""
    with ExitStack() as stack:
        for path, hook in hooks.items():
            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def observe(
    model: nn.Module, names: Iterable[str], *, on_input: OnTensor | None = None, on_output: OnTensor | None = None
) -> Iterator[Eye]:
    """Call the callbacks with (module name, [tokens, features]) at every forward of every named module.

    The callbacks must neither change nor keep what they are given, so that memory is that of one tensor. Raises
    NotFoundError for a name that the model does not have.
    """
    modules = dict(model.named_modules())
    eye = Eye()
    with ExitStack() as stack, torch.no_grad():
        stack.callback(eye.forget)
        for name in names:
            if name not in modules:
                raise NotFoundError(f"the model has no module {name!r}{nearest(name, list(modules))}")
            if on_input is not None:
                hook = _input_hook(name, eye, on_input)
                stack.callback(modules[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
            if on_output is not None:
                stack.callback(modules[name].register_forward_hook(_output_hook(name, eye, on_output)).remove)
        yield eye


def first_tensor(value: Any) -> Tensor | None:
    """Return the tensor itself, or the first of a tuple (decoder layers of some versions return one)."""
    if isinstance(value, Tensor):
        return value
    return next((v for v in value if isinstance(v, Tensor)), None) if isinstance(value, tuple | list) else None


def require_finite_rows(values: Tensor, what: str, model: nn.Module, again: Callable[[], Any]) -> None:
    """Raise NotFinite where a row of `values` [..., n] holds NaN or +inf, or nothing but -inf; one number is read.

    Only then is the model run `again`, to name the first module whose output holds such a thing.
    """
    if not isfinite(float(values.detach().amax(-1).sum())):
        raise NotFinite(f"{what} hold NaN or infinity{_first_not_finite(model, again)}")


def _first_not_finite(model: nn.Module, again: Callable[[], Any]) -> str:
    origin: list[str] = []

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            value = first_tensor(output)
            if not origin and value is not None and not _finite(value):
                own = [name for name, weight in module.named_parameters(recurse=False) if not _finite(weight)]
                origin.append(f"; first out of {path}" + (f", whose {own[0]} holds it" if own else ""))

        return hook

    paths = [path for path, _ in model.named_modules() if path]
    with hooked(model, {path: look(path) for path in paths}), torch.no_grad(), suppress(RuntimeError):
        again()
    return origin[0] if origin else ""


def _finite(x: Tensor) -> bool:
    """Return whether there is neither NaN nor +inf: masks add -inf, and packed weights hold nothing to look at."""
    return x.is_meta or not x.is_floating_point() or not bool((x.isnan() | x.isposinf()).any())


def _input_hook(name: str, eye: Eye, on_tensor: OnTensor) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = first_tensor(args)
        value = first_tensor(list(kwargs.values())) if value is None else value
        if value is not None and value.numel():
            on_tensor(name, eye.tokens(value))

    return hook


def _output_hook(name: str, eye: Eye, on_tensor: OnTensor) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        value = first_tensor(output)
        if value is not None and value.numel():
            on_tensor(name, eye.tokens(value))

    return hook
