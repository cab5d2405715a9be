"""What triton's interpreter gets wrong in bf16, and that `mend_bf16` puts it right."""

import pytest
import torch


def product(x, y, kernel_dtype):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))

    out = torch.empty(16, 16, dtype=torch.float32)
    kernel[(1,)](x.to(kernel_dtype), y.to(kernel_dtype), out, N=16)
    return out


def rounded(x):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, out_ptr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))

    out = torch.empty(x.shape, dtype=torch.bfloat16)
    kernel[(1,)](x, out, N=len(x))
    return out


def check_products_of_bf16_are_right(rng):
    x, y = (torch.randn(16, 16, generator=rng).bfloat16() for _ in range(2))
    want = x.double() @ y.double()
    # Products of bf16 are exact in fp32; 16 of them of order one are summed there.
    torch.testing.assert_close(product(x, y, torch.bfloat16).double(), want, atol=1e-5, rtol=0)


def check_bf16_rounds_to_nearest_even(rng):
    x = torch.randn(256, generator=rng)
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -1 - 2**-9 * 1.5])
    assert torch.equal(rounded(x), x.bfloat16())


CHECKS = [check_products_of_bf16_are_right, check_bf16_rounds_to_nearest_even]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mended(check, interpreted):
    assert interpreted(__file__)[check.__name__] == ""


if __name__ == "__main__":
    from interpreter import main

    main(CHECKS)
