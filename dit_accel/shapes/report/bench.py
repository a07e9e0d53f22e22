"""What every comparison of contenders with dense needs: the prompts, the results, and dense runs themselves."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from ...metrics import noise_floor, psnr, ssim
from .judging import decibels, judged
from .records import Record
from .results import DENSE, Results
from .sampling import Sample, Sampler, tell
from .subsets import Subset

SamplerT = TypeVar("SamplerT", bound=Sampler)


class Bench(Generic[SamplerT]):
    """Renders prompts dense, and judges what others render.

    Args:
        sampler: of the model.
        subset: its prompts.
        results: where all is kept, and what is there already.
    """

    def __init__(self, sampler: SamplerT, subset: Subset, results: Results) -> None:
        self.sampler, self.subset, self.results = sampler, subset, results
        self._is_warm = False
        self._earlier: torch.Tensor | None = None  # dense clip of the first prompt

    def warm_up(self) -> None:
        """Once, a dense run of the first prompt, which takes slow beginnings away from what is timed after it.

        As long as the noise floor is unknown, it is kept, to see how far the next one is from it.
        """
        if self._is_warm:
            return
        self._is_warm = True
        video = self.sampler.sample(self.subset.prompts[0].prompt, 0, DENSE).video
        if self.results.get("noise_floor", DENSE) is None:
            self._earlier = video

    def _keep_dense(self, index: int, sample: Sample) -> None:
        if index == 0 and self._earlier is not None:
            floor = decibels(noise_floor([self._earlier, sample.video]))
            self.results.add("noise_floor", DENSE, {"psnr_db": floor})
            self._earlier = None  # the floor is that of two runs before any contender
        self.results.add(DENSE, DENSE, self._judged(index, sample), index)
        tell(f"[{index + 1}/{len(self.subset.prompts)}] dense: {sample.sampling_seconds:.1f} s")

    def _judged(self, index: int, sample: Sample) -> Record:
        found = judged(sample.video, self.subset.prompts[index], self.subset.slots)
        verdict: Record = {name: found[name] for name in ("right", "all", "bound") if name in found}
        return {**verdict, "sampling_seconds": round(sample.sampling_seconds, 3)}


def likeness(sample: Sample, dense: Sample) -> Record:
    """PSNR in dB and SSIM of a sample against the dense one from the same noise."""
    return {
        "psnr_db": decibels(psnr(sample.video, dense.video)),
        "ssim": round(ssim(sample.video, dense.video), 4),
    }
