"""What plans of clusters refuse for want of memory."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.bitmap import Bitmap
from dit_accel.kernels.cluster import plan as module
from dit_accel.kernels.cluster.plan import ClusterRule, cluster_plan


@pytest.mark.parametrize("block", [16, 32, 64])
def test_the_limit_of_exact_plans_is_what_their_bitmaps_take(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 16 keys takes a whole word of 32 bits."""
    q, k = torch.randn(2, 2, 3, 100, 8, generator=torch.Generator().manual_seed(0)).unbind()
    rule = ClusterRule((90, 100), 4, 6, 1, block, 0.9, 1, -(-100 // block), True)
    test = cluster_plan(q, k, rule)[0].pair_test
    assert isinstance(test, Bitmap)
    monkeypatch.setattr(module, "EXACT_BYTES", test.words.nbytes)
    cluster_plan(q, k, rule)
    monkeypatch.setattr(module, "EXACT_BYTES", test.words.nbytes - 1)
    with pytest.raises(ValueError, match="boundaries='keep'"):
        cluster_plan(q, k, rule)
