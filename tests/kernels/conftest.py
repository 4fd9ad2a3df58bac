"""What torch leaves uninitialised holds NaN, or numbers that are no index: what a kernel does not write shows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return made

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, filling(getattr(holder, name)))
