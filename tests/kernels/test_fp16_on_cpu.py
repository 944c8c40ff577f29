"""Products in fp16 that are computed in fp32: of every form, rounded once, in backward passes too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankup.kernels import fp16_on_cpu
from rankup.kernels.fp16_on_cpu import PRODUCTS, fp16_products

X, W, B = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half() for shape in ((7, 300), (5, 300), (5,)))
BATCH, OTHER = X.expand(3, 7, 300), W.expand(3, 5, 300).transpose(1, 2)


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp16_on_cpu, "multiplies_fp16", lambda: False)


FORMS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "mm": (lambda x, w: x @ w.t(), (X, W)),
    "linear": (torch.nn.functional.linear, (X, W, B)),
    "linear, batched": (torch.nn.functional.linear, (BATCH, W)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=0.5), (X, W, B)),
    "bmm": (torch.bmm, (BATCH, OTHER)),
    "in place": (lambda x, w, b: b.expand(7, 5).clone().addmm_(x, w.t(), alpha=2.0), (X, W, B)),
    "batched, in place": (lambda x, w: x.new_ones(3, 7, 5).baddbmm_(x, w, alpha=0.1), (BATCH, OTHER)),
    "into a buffer": (lambda x, w: torch.mm(x, w.t(), out=x.new_empty(7, 5)), (X, W)),
    "batched, into a buffer": (
        lambda x, w: torch.baddbmm(x.new_ones(1), x, w, beta=0, out=x.new_empty(3, 7, 5)),
        (BATCH, OTHER),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inference", [True, False])
def test_every_form_is_the_product_in_fp32_rounded_once(form: str, inference: bool) -> None:
    function, operands = FORMS[form]
    with fp16_products(torch.float16), torch.inference_mode(inference):
        result = function(*operands)
    assert result.dtype == torch.float16
    assert torch.equal(result, function(*(t.float() for t in operands)).half())


def test_backward_passes_too() -> None:
    x, w = (t.detach().clone().requires_grad_() for t in (X, W))
    wide = [t.detach().float().requires_grad_() for t in (X, W)]
    with fp16_products(torch.float16):
        (x @ w.t()).sum().backward()
    (wide[0] @ wide[1].t()).sum().backward()
    assert x.grad is not None and w.grad is not None and wide[0].grad is not None and wide[1].grad is not None
    assert torch.equal(x.grad, wide[0].grad.half()) and torch.equal(w.grad, wide[1].grad.half())


def test_no_product_of_the_trainer_remains_in_fp16(make_policy) -> None:
    from sample_groups import random_groups

    from rankup.grpo.model.packing import pack

    class Seen(TorchDispatchMode):
        """Beneath the other mode: it sees what is really computed."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "matmul", "linear"}
            if func.overloadpacket.__name__ in names:
                assert all(t.dtype == torch.float32 for t in args if isinstance(t, torch.Tensor)), func
                found.add(func)
            return func(*args, **(kwargs or {}))

    found: set[object] = set()
    policy = make_policy("qwen2", dtype="float16")
    (one,) = pack(random_groups([(5, [4, 6])]), tokens_per_pack=100)
    with Seen():
        policy.backward(one, lambda logprobs_n, _entropy_n, _chunk: -logprobs_n)
    assert found and len(PRODUCTS) >= len(found)


def test_other_dtypes_are_left_alone() -> None:
    with fp16_products(torch.bfloat16) as mode:
        assert mode is None
    with fp16_products(torch.float16):
        assert torch.equal(X.bfloat16() @ W.bfloat16().t(), torch.mm(X.bfloat16(), W.bfloat16().t()))
