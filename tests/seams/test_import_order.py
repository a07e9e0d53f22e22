"""``set_attn_processor`` knows our processors whichever package is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
{imports}
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
import dit_accel
from dit_accel.processors import RadialAttnProcessor

model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, text_dim=16, freq_dim=16, ffn_dim=16,
                              num_layers=1, rope_max_seq_len=16)
model.set_attn_processor(RadialAttnProcessor())
assert dit_accel.acceleration_of(model) is not None
assert callable(WanPipeline.set_attn_processor) and callable(DiffusionPipeline.set_attn_processor)
"""


@pytest.mark.parametrize("imports", ["import dit_accel, diffusers", "import diffusers.models.attention, dit_accel"])
def test_either_order(imports):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(imports=imports)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
