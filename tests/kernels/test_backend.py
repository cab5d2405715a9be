"""What `auto` stands for."""

import pytest
import torch

from kernels.backend import choose


def test_auto_is_triton_on_cuda_where_it_imports(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr("kernels.backend.has_triton", lambda there=there: there)
        assert choose("auto", torch.device("cpu"), what="x") == "torch"
        on_cuda = choose("auto", torch.device("cuda"), what="x")
        assert on_cuda == ("triton" if there else "torch")


def test_a_backend_that_is_unknown_or_absent_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"loss backend 'cuda': wanted one of .*'auto'"):
        choose("cuda", torch.device("cpu"), what="loss")
    monkeypatch.setattr("kernels.backend.has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"loss backend 'triton'.*take 'torch'"):
        choose("triton", torch.device("cuda"), what="loss")
