"""A CUDA device on any machine: its tensors are PyTorch's fake ones (shape, dtype and device, no values), those of the host are real."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mar_model.sampling.token_sampler import _StaticLoop

CUDA = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Waited(Exception):
    """A copy between host and device for which the host would wait."""


class FakeCuda(TorchDispatchMode):
    """`FakeTensorMode` for what lies on the device alone.

    The fake mode raises an error for operations on tensors of two devices, and for what reads a value (`item`, a tensor as a condition,
    `nonzero`, a Boolean mask as an index). In `must_not_wait`, copies between host and device without `non_blocking=True` raise Waited
    too; to the host they always do, since there is no value to copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.strict = False

    @contextmanager
    def must_not_wait(self) -> Iterator[None]:
        self.strict = True
        yield
        self.strict = False

    def __enter__(self) -> "FakeCuda":
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        self.fake.__exit__(*arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        if func is torch.ops.aten.is_pinned.default:
            return True
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else ""
        if not any(isinstance(one, FakeTensor) for one in tensors) and target != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten.empty_like.default and target == "cpu":
            with unset_fake_temporarily():
                return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func in COPIES:
            self._check_copy(func, args, kwargs, target)
            if func is torch.ops.aten.copy_.default and args[0].device.type == "cpu":
                with unset_fake_temporarily():
                    return args[0].fill_(1)  # a value that the device might have
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
            return func(*args, **kwargs)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _check_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: str) -> None:
        in_place = func is torch.ops.aten.copy_.default
        source, destination = (args[1], args[0].device.type) if in_place else (args[0], target)
        waits = not (args[2] if in_place and len(args) > 2 else kwargs.get("non_blocking", False))
        if source.device.type == "cuda" and destination == "cpu" and (waits or not in_place):
            raise Waited(f"a copy of {tuple(source.shape)} to the host")
        if source.device.type == "cpu" and (destination or "cpu") == "cuda" and waits and self.strict:
            raise Waited(f"a copy of {tuple(source.shape)} to the device without non_blocking=True")


class FakeStream:
    """In place of `torch.cuda.Stream` and `torch.cuda.Event`, which need a driver: nothing is ordered, nothing is waited for."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def record(self, *arguments: Any) -> None:
        pass

    wait = wait_event = wait_stream = synchronize = record

    def record_event(self, *arguments: Any) -> "FakeStream":
        return self


class FakeReducer:
    """In place of DDP's C++ reducer, which measures its first steps with CUDA events."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def apply_to_fake(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of `nn.Module._apply` (`to`, `float`, …), which cannot exchange fake parameters in place."""
    for one in module.modules() if recurse else [module]:
        for name, parameter in one._parameters.items():
            one._parameters[name] = None if parameter is None else nn.Parameter(change(parameter.detach()), parameter.requires_grad)
        for name, buffer in one._buffers.items():
            one._buffers[name] = None if buffer is None else change(buffer)
    return module


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The mode, with what asks for a driver replaced."""
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "current_stream", FakeStream)
    patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for name in ("Event", "Stream"):
        patch.setattr(torch.cuda, name, FakeStream)
    patch.setattr(_StaticLoop, "_capture", lambda *_: None)  # the loop runs on its static buffers, eagerly
    patch.setattr(nn.Module, "_apply", apply_to_fake)
    patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)  # a copied model stays on the same device
    with FakeCuda() as mode:
        yield mode


def without_backward(patch: pytest.MonkeyPatch, model: nn.Module) -> None:
    """Let `Tensor.backward` fill the model's gradients: PyTorch's autograd engine asks the driver for the device's streams.

    (`test_waiting.py` runs the backward pass on the meta device.)
    """

    def fill(loss: Tensor) -> None:
        assert loss.requires_grad
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # as its backward pass does
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    patch.setattr(torch.Tensor, "backward", fill)
