"""What an installation consists of, whether the parts fit together, and whether MTP pays here."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import LlamaMtpError

if TYPE_CHECKING:
    from .inspect import Inspection
    from .trial import Judgement, Trial

# Beginnings of names. Not all of LLAMA_: keys to other people's services begin so too.
_VARIABLES = (
    "LLAMA_MTP_",
    "LLAMA_ARG_SPEC_",
    "LLAMA_ARG_CTX_CHECKPOINTS",
    "LLAMA_CPP_LIB",
    "GGML_",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `detail` says what to do where `ok` is false."""

    ok: bool
    what: str
    detail: str


@dataclass(frozen=True)
class Examination:
    """What `examine` found about one file. ``trial`` is None where it could not be tried."""

    inspection: Inspection
    trial: Trial | None
    judgement: Judgement

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; sizes in bytes."""
        return {
            "inspection": self.inspection.to_dict(),
            "trial": self.trial and asdict(self.trial),
            **asdict(self.judgement),
        }


def findings() -> Iterator[Finding]:
    """Yield versions, the host's build and devices, its functions, and the environment.

    Never raises: what does not work is a finding.
    """
    yield Finding(True, "python", f"{platform.python_version()} on {platform.machine()}")
    yield Finding(True, "llama-mtp", __version__)
    for what, look in (
        ("llama-cpp-python", _host_version),
        ("host library", _host_library),
        ("host build", _host_build),
        ("host devices", _devices),
        ("host functions", _functions),
        ("native engine", _engine),
        ("plugins", _plugins),
        ("environment", _environment),
    ):
        try:
            yield Finding(True, what, look())
        except (LlamaMtpError, ImportError, OSError, AttributeError) as error:
            yield Finding(False, what, str(error))
    yield Finding(True, "processor cores", str(usable_cores()))


def examine(path: str, draft_model: str | None = None, **options: Any) -> Examination:
    """Inspect one file, try it, and say whether to turn MTP on here.

    Args:
        path: the GGUF.
        draft_model: a file that holds its head.
        options: those of `trial.measure`, ``n_ctx`` and ``spec_draft_n_max`` among them.

    Raises:
        ModelFileError: a file is unreadable, no GGUF, damaged or truncated.
        LlamaMtpError: no child process can be started.
    """
    from .inspect import inspect_file
    from .trial import Judgement, judge, run_trial

    inspection = inspect_file(
        path,
        draft_model=draft_model,
        n_ctx=options["n_ctx"],
        depth=options["spec_draft_n_max"],
        options={"n_gpu_layers": options.get("n_gpu_layers", 0)},
    )
    if inspection.reason:
        advice = f"Leave MTP off here: {inspection.reason} {inspection.remedy}"
        todo = (inspection.next_command,)
        return Examination(inspection, None, Judgement("impossible", advice, todo))
    own_head = {} if draft_model is None else {"spec_draft_model": draft_model}
    outcome = run_trial(path, **options, **own_head)
    if isinstance(outcome, Judgement):
        return Examination(inspection, None, outcome)
    return Examination(inspection, outcome, judge(outcome, inspection.cheaper_command))


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_version() -> str:
    from .. import host

    host.check_version()
    return host.version()


def _host_library() -> str:
    from .. import host

    offload = "can" if host.can_offload() else "cannot"
    return f"{host.library_path()} ({offload} offload to a GPU here)"


def _host_build() -> str:
    from .. import host

    return host.build_flags()


def _devices() -> str:
    from .. import host

    found = host.devices()
    if found is None:
        return "not told by this library"
    lines = [
        f"{name}: {description}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        for name, description, free, total in found
    ]
    return "\n".join(lines) or "none"


def _engine() -> str:
    from ..engine import native

    return f"built for {__version__}, {len(native.function_names())} host functions wanted"


def _functions() -> str:
    from .. import host
    from ..engine import native

    missing: list[str] = []
    names = native.function_names()
    for name in names:
        try:
            host.address_of(name)
        except LlamaMtpError:
            missing.append(name)
    if missing:
        raise LlamaMtpError(
            f"not found: {', '.join(missing)}; install a supported llama-cpp-python (>= 0.3.36)."
        )
    return f"all {len(names)} found"


def _plugins() -> str:
    """The plugins that were loaded; broken ones are told with the spec types."""
    from .. import registry

    names = (name for name, plugin in registry.plugin_manager().list_name_plugin() if plugin)
    return ", ".join(names) or "none"


def _environment() -> str:
    """Variables that change what this package or the host does.

    Raises SpecTypeError for one of ours that no `Llama` could be made with.
    """
    from ..registry import RESERVED, resolve
    from ..settings import read_options

    options = read_options()
    if options.spec_type not in RESERVED:
        resolve(options.spec_type)
    found = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)]
    return "\n".join(found) or "nothing set"
