"""A script that uses the stock class. With MTP, unedited:

    llama-mtp run --spec-type draft-mtp examples/unedited_script.py [MODEL.gguf]

With plain ``python examples/unedited_script.py`` it runs as it always did. (Only the path of the
demo model comes from this package.)
"""

import sys

from llama_cpp import Llama

from llama_mtp.demo.model import demo_model

path = sys.argv[1] if len(sys.argv) > 1 else str(demo_model())

llm = Llama(model_path=path, n_ctx=2048, verbose=False)
answer = llm("Q: Why do leaves fall in autumn? A:", max_tokens=64, temperature=0.0)
print(answer["choices"][0]["text"])
print(f"class {type(llm).__module__}.{type(llm).__name__}")
