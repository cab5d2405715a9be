"""What a forward pass leaves in a store and reads from it."""

import pytest
import torch

from lvm.decoding.cache import Fill, Store


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_cache_changes_no_logit(make_model, rng, qk_norm):
    model = make_model(qk_norm=qk_norm)
    ids = torch.randint(0, 40, (2, 20), generator=rng)
    store = Store(model.config, rows=3, places=20, like=model.head.weight.detach())
    cache = Fill(store, torch.tensor([2, 0]))
    with torch.no_grad():
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 20))]
        # fp32, the same sums in another order
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-4, rtol=0)
    assert cache.length == 20


def test_rows_go_on_from_a_prefix_that_is_not_copied(make_model, rng):
    model = make_model()
    ids = torch.randint(0, 40, (2, 7), generator=rng)  # two prompts, of which five places count
    own = torch.randint(0, 40, (3, 6), generator=rng)
    like = model.head.weight.detach()
    prefix = Store(model.config, rows=2, places=7, like=like)
    suffix = Store(model.config, rows=4, places=6, like=like)
    owners = torch.tensor([1, 0, 1])
    with torch.no_grad():
        model.features(ids, cache=Fill(prefix, torch.arange(2)))
        rows = torch.tensor([0, 1, 3])
        fill = Fill(suffix, rows, prefix=prefix, owners=owners, start=5)
        found = torch.cat([model(own[:, :2], cache=fill), model(own[:, 2:], cache=fill)], 1)
        wanted = model(torch.cat([ids[owners, :5], own], 1))[:, 5:]
    # fp32, the same sums in another order
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert suffix.bytes == 2 * 2 * 4 * 2 * 6 * 8 * 4  # k and v, layers, rows, groups, places, fp32


def test_a_full_store_is_refused(make_model):
    model = make_model()
    store = Store(model.config, rows=1, places=5, like=model.head.weight.detach())
    with pytest.raises(ValueError, match="holds 5 places; 6 are needed"), torch.no_grad():
        model(torch.zeros(1, 6).long(), cache=Fill(store, torch.tensor([0])))
