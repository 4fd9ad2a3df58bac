import torch

from sae.products import rounded_product


def test_a_rounded_product_has_the_gradients_of_a_product_but_for_the_rounding() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 24, requires_grad=True), torch.randn(24, 30, requires_grad=True)
    up = torch.randn(40, 30)
    exact = torch.autograd.grad((a @ b * up).sum(), (a, b))
    found = torch.autograd.grad((rounded_product(a, b) * up).sum(), (a, b))
    for one, other in ((rounded_product(a, b), a @ b), *zip(found, exact, strict=True)):
        assert one.dtype == torch.float32
        assert 1e-5 < (one - other).norm() / other.norm() < 1e-2
