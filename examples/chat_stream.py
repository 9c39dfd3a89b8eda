"""A streamed chat with a sampler and a seed: the tokens are those that the stock class gives.

python examples/chat_stream.py [MODEL.gguf]
"""

import sys

from llama_mtp import Llama
from llama_mtp.demo.model import demo_model

path = sys.argv[1] if len(sys.argv) > 1 else str(demo_model())
messages = [{"role": "user", "content": "Name three things to pack for a walk in the rain."}]

with Llama(path, n_ctx=2048, seed=7, spec_type="draft-mtp", verbose=False) as llm:
    for chunk in llm.create_chat_completion(
        messages, stream=True, max_tokens=96, temperature=0.7, top_p=0.95
    ):
        print(chunk["choices"][0]["delta"].get("content", ""), end="", flush=True)
    print()
    print(f"mean acceptance length {llm.spec_stats.mean_acceptance_length:.2f}")
    print(f"acceptance per position {llm.spec_stats.acceptance_per_pos}")
