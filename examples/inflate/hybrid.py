"""Write a small hybrid GGUF whose head has a known acceptance in each of nine classes of prompts.

    python hybrid.py small.gguf --type BF16

Each of the nine prompts of ``llama-mtp bench`` starts a cycle of words of its own. In these cycles
the head is right after 95, 90, 85, 80, 70, 60, 40, 20 and 0 % of the words; where it is wrong it is
mostly less sure. Run it in a checkout: the model is built by code of the tests.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from llama_mtp.commands.main import errors_in_one_line
from llama_mtp.errors import LlamaMtpError
from llama_mtp.gguf.header import read_header
from llama_mtp.gguf.metadata import metadata_of
from llama_mtp.gguf.quantize import requantize, type_number
from llama_mtp.gguf.write import check_destination, stored, write_gguf
from llama_mtp.measure.pairs import PROMPTS

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from models import cycles


def hybrid(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    kind: Annotated[str, typer.Option("--type", help="ggml type of the matrices.")] = "BF16",
    width: Annotated[int, typer.Option(help="n_embd, more than the words.")] = 1024,
    shares: Annotated[
        str, typer.Option(help="Of the words after which the head is right, by class.")
    ] = ",".join(map(str, cycles.SHARES)),
    period: Annotated[int, typer.Option(help="Words of a class.")] = cycles.PERIOD,
    certainty: Annotated[float, typer.Option(help="Of the trunk's best word.")] = 0.85,
    confident: Annotated[float, typer.Option(help="Of the head's best word, if sure.")] = 0.9,
    doubtful: Annotated[float, typer.Option(help="The same, if not sure.")] = 0.4,
    mistaken: Annotated[
        float, typer.Option(min=0, max=1, help="Share of words with the wrong one of these two.")
    ] = 0.1,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Tokens in all: words that no text has fill the output.")
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Write FILE and print which class has which share of right words."""
    check_destination(file, [], force=force)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = cycles.build(
                Path(folder) / "f32.gguf",
                n_embd=width,
                shares=[float(share) for share in shares.split(",")],
                period=period,
                certainty=certainty,
                confident=confident,
                doubtful=doubtful,
                mistaken=mistaken,
                n_vocab=vocabulary,
            )
        except ValueError as e:
            raise LlamaMtpError(str(e)) from e
        header = read_header(made.model.path)
        sources = [stored(header, tensor) for tensor in header.tensors.values()]
        write_gguf(
            file,
            metadata_of(header),
            [requantize(source, type_number(kind)) for source in sources],
        )
    print(f"{file}: width {width}, {made.words.size} words, in {kind}")
    print("class             cycle  right")
    for k, name in enumerate(PROMPTS):
        cycle = k % len(made.words)
        print(f"{name:16}  {cycle:5}  {made.right[cycle].mean():5.2f}")


if __name__ == "__main__":
    with errors_in_one_line():
        typer.run(hybrid)
