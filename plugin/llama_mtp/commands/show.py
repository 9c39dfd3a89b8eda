"""The console, and what the commands ``inspect`` and ``doctor`` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..measure.doctor import Finding
    from ..measure.inspect import Inspection, Quantisation
    from ..measure.trial import Judgement, Trial

console = Console()

_ROLLBACK = {
    "attention": "the KV cache is cut",
    "snapshots": "snapshots of the recurrent state",
    "checkpoint": "a saved copy of the recurrent state, and a replay",
}


def show_header(console: Console, found: Inspection) -> None:
    """Print what the file itself says."""
    heads = f"{found.n_layer_trunk} layers, {found.n_heads} NextN head{'s' * (found.n_heads != 1)}"
    rows = {
        "file": _parts(found),
        "name": found.name,
        "head's file": found.draft_model or "",
        "architecture": found.architecture or "not said",
        "blocks": heads,
        "hidden size": str(found.n_embd),
        "vocabulary": f"{found.n_vocab:,} tokens",
        "trained context": f"{found.n_ctx_train:,} tokens",
        "head's tensors": f"{len(found.present)} there" * bool(found.n_heads),
        "missing": ", ".join(found.missing),
        "head": _types(found.head) if found.present or found.draft_model else "",
        "trunk": _types(found.trunk),
        "rollback": _ROLLBACK[found.rollback],
        "head's memory": _memory(found) if found.n_heads else "",
        "a draft step": _reads(found),
    }
    print_grid(console, {name: text for name, text in rows.items() if text})


def show_verdict(console: Console, found: Inspection) -> None:
    """Print what the host said, what MTP will cost, and what to do."""
    rows: dict[str, str] = {}
    if found.host_runs is not None:
        answer = "sets the head up" if found.host_runs else "refuses the head"
        who = f"llama-cpp-python {found.host}" if found.host else "the host"
        rows["asked"] = f"{who} {answer} ({found.probe_seconds:.1f} s, no weights loaded)"
    elif found.forecast is not None:
        rows["asked"] = "nobody: by the header alone, and what is known of the architecture"
    if rows:
        console.print()
        print_grid(console, rows)
    if found.forecast is not None:
        _show_forecast(console, found)
    if found.cheaper_command:
        console.print(
            f"\nDrafts can read less: [bold]{plain(found.cheaper_command)}[/]", soft_wrap=True
        )
    if found.verdict == "run":
        option = "spec_type='draft-mtp'"
        if found.draft_model is not None:
            option = f"spec_draft_model={found.draft_model!r}"
        text = f"[green]runs[/] with {plain(option)}"
    else:
        text = f"[red]no MTP as it is[/]: {plain(found.reason)} {plain(found.remedy)}"
    console.print(f"\n{text}\nNext: [bold]{plain(found.next_command)}[/]", soft_wrap=True)


def show_findings(console: Console, findings: list[Finding]) -> None:
    """Print the state of the installation."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # the library's whole path
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.what, plain(finding.detail))
    console.print(table)


def show_trial(console: Console, trial: Trial, head_weights: int) -> None:
    """Print what was measured; ``head_weights`` in bytes."""
    rates = " ".join(f"{rate:.2f}" for rate in trial.acceptance)
    same = f"{trial.tokens} compared, "
    if trial.partings:
        same += f"parted at {len(trial.partings)}, of which {trial.illegal} beyond rounding"
    else:
        same += "all the same"
    rows = {
        "tokens": same,
        "drafts": f"{trial.accepted} of {trial.drafted} accepted, by position {rates}",
        "speed": f"{trial.plain_rate:.1f} tokens/s plain, {trial.mtp_rate:.1f} with MTP, "
        f"ratio {trial.ratio:.2f}",
        "depth": trial.reckoning,
        "memory": f"{_mib(head_weights, sign=True)} of head, "
        f"{_mib(trial.added_memory, sign=True)} of buffers against stock",
        "buffers": ", ".join(f"{part} {_mib(size)}" for part, size in trial.memory.items() if size),
    }
    print_grid(console, rows)
    for parting in trial.partings:
        if "ILLEGAL" in parting:
            console.print(f"  {parting}", markup=False, highlight=False, soft_wrap=True)


def show_judgement(console: Console, judgement: Judgement) -> None:
    """Print the advice in one line, and what to try below it."""
    colour = {"on": "green", "even": "yellow", "off": "yellow"}.get(judgement.verdict, "red")
    console.print(f"\n[{colour}]{plain(judgement.advice)}[/]", soft_wrap=True, highlight=False)
    for attempt in judgement.attempts:
        console.print(f"  Try: {plain(attempt)}", soft_wrap=True, highlight=False)


def _show_forecast(console: Console, found: Inspection) -> None:
    cost = found.forecast
    assert cost is not None
    source = "" if cost.source == "host" else ", by header arithmetic"
    console.print(f"memory  n_ctx {cost.n_ctx}, depth {cost.depth}{source}", highlight=False)
    table = Table("MTP adds", "")
    table.columns[1].justify = "right"
    for part, size in cost.parts.items():
        table.add_row(part, "only the host knows" if size is None else _mib(size, sign=True))
    table.add_section()
    table.add_row("in all" if cost.complete else "at least", _mib(cost.total, sign=True))
    console.print(table)


def print_grid(console: Console, rows: Mapping[str, str]) -> None:
    """Print names and what stands for them, line by line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows.items():
        grid.add_row(name, plain(text))
    console.print(grid, highlight=False)


def plain(text: str) -> str:
    """Text from outside, safe to print: no markup, nothing that steers a terminal."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return escape("".join(c if c.isprintable() or c == "\n" else "�" for c in text))


def _parts(found: Inspection) -> str:
    parts = f" in {found.n_parts} parts" if found.n_parts > 1 else ""
    return f"{found.path}, {_mib(found.file_size)}{parts}"


def _types(quantisation: Quantisation) -> str:
    if not quantisation.n_bytes:
        return "nothing"
    shares = [
        f"{kind} {size / quantisation.n_bytes:.0%}"
        for kind, size in quantisation.bytes_by_type.items()
    ]
    return f"mainly {quantisation.main}, {_mib(quantisation.n_bytes)} ({', '.join(shares)})"


def _memory(found: Inspection) -> str:
    return "reads the KV cache of its target" if found.shares_kv else "a KV cache of its own"


def _reads(found: Inspection) -> str:
    """What drafting costs where memory bounds it; nothing where no head runs."""
    if found.reads is None:
        return ""
    whose = "its own output matrix" if found.reads.own_output else "the output matrix"
    return (
        f"reads {_mib(found.reads.step)}, {found.reads.share:.0%} of what a token reads; "
        f"{whose} is {found.reads.output / max(found.reads.step, 1):.0%} of it"
    )


def _mib(size: int, *, sign: bool = False) -> str:
    return f"{size / 2**20:{'+' if sign else ''},.2f} MiB"
