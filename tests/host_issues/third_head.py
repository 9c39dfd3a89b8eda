"""hy_v3 with three heads: masked rows, as llama.cpp's own loop reads them, are another token's.

python tests/host_issues/third_head.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.families import FAMILIES
from models.reference import Reference

with tempfile.TemporaryDirectory() as folder:
    reference = Reference(FAMILIES["hy_v3"].build(Path(folder), 3, 1))
text = list(range(300, 330))
true = reference.last_row(text, masked=False, all_outputs=True)
for masked in (False, True):
    row = reference.last_row(text, masked=masked, all_outputs=False)
    print(f"masked={masked}: off by {np.abs(row - true).max():.1f}")
