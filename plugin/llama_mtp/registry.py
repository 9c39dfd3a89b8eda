"""The plugins: loading them by entry point, and the spec types that they offer.

Nothing is loaded on import. The first question builds the plugin manager; a plugin that is broken
is skipped and reported by name, and never stops a model from loading.
"""

from __future__ import annotations

import difflib
import logging
import os
import threading
from importlib.metadata import EntryPoint, entry_points

import pluggy

from .errors import SpecTypeError
from .hooks import NAMESPACE, SpecType, specs

BLOCK_VARIABLE = "LLAMA_MTP_BLOCK_PLUGINS"
RESERVED = frozenset({"auto", "none"})

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_manager: pluggy.PluginManager | None = None
_broken: dict[str, str] = {}


def plugin_manager() -> pluggy.PluginManager:
    """The process's plugin manager, built on the first call.

    Entry points of the group ``llama_mtp`` are loaded in order of name, the built-in ones first, so
    that theirs is the last word in a decision hook. Names listed in the environment variable
    ``LLAMA_MTP_BLOCK_PLUGINS`` (comma-separated) are left out. A plugin may also be registered by
    hand, with ``plugin_manager().register(plugin, name="...")``.
    """
    global _manager
    with _lock:
        if _manager is None:
            manager = pluggy.PluginManager(NAMESPACE)
            manager.add_hookspecs(specs)
            for name in os.environ.get(BLOCK_VARIABLE, "").split(","):
                if name.strip():
                    manager.set_blocked(name.strip())
            for entry_point in sorted(entry_points(group=NAMESPACE), key=_loading_order):
                _load(manager, entry_point)
            _manager = manager
        return _manager


def broken_plugins() -> dict[str, str]:
    """Plugins that were skipped: name to reason."""
    plugin_manager()
    return dict(_broken)


def check_pending() -> None:
    """Report plugins whose hooks have no specification, those registered by hand included.

    Raises:
        pluggy.PluginValidationError: names the plugin and the hook.
    """
    plugin_manager().check_pending()


def reset() -> None:
    """Forget the manager; the next question loads the plugins anew."""
    global _manager
    with _lock:
        _manager = None
        _broken.clear()


def spec_types() -> dict[str, SpecType]:
    """All usable spec types by name, and again by each alias."""
    types: dict[str, SpecType] = {}
    manager = plugin_manager()
    plugins = [plugin for _, plugin in manager.list_name_plugin() if plugin is not None]
    for plugin in plugins:
        # One plugin at a time: an exception in one must not hide what the others offer.
        others = [other for other in plugins if other is not plugin]
        ask = manager.subset_hook_caller("mtp_register_spec_types", others)
        offered: list[SpecType] = []
        try:
            ask(register=offered.append)
            names = _checked_names(offered, types)
        except Exception as error:
            _report(manager.get_name(plugin) or repr(plugin), error)
        else:
            types |= names
    return types


def resolve(name: str) -> SpecType:
    """The spec type called `name`, an alias included.

    Raises:
        SpecTypeError: there is none; the message lists close matches, or all names, and says if a
            broken plugin may be why.
    """
    types = spec_types()
    if name in types:
        return types[name]
    close = difflib.get_close_matches(name, [*types, *RESERVED], n=3)
    known = " or ".join(close) if close else ", ".join(sorted({*types, *RESERVED}))
    message = f"There is no spec type {name!r}. Use {known}, or install the plugin that offers it."
    if broken := broken_plugins():
        message += f" These plugins are broken: {', '.join(sorted(broken))}."
    raise SpecTypeError(message)


def _loading_order(entry_point: EntryPoint) -> tuple[bool, str, str]:
    return (not entry_point.value.startswith("llama_mtp."), entry_point.name, entry_point.value)


def _load(manager: pluggy.PluginManager, entry_point: EntryPoint) -> None:
    """Import and register one plugin; on any failure leave no trace of it in the manager."""
    name = entry_point.name
    if manager.is_blocked(name):
        return
    plugin = None
    try:
        if manager.has_plugin(name):
            raise ValueError("another plugin of this name is already loaded")
        plugin = entry_point.load()
        manager.register(plugin, name=name)
        _check_unmarked(manager, plugin)
        manager.check_pending()
    except Exception as error:
        _report(name, error)
        if plugin is not None and manager.get_plugin(name) is plugin:
            manager.unregister(plugin)


def _check_unmarked(manager: pluggy.PluginManager, plugin: object) -> None:
    """pluggy ignores a function without the marker; a plugin that then does nothing is a puzzle."""
    hooks = {name for name in dir(specs) if name.startswith("mtp_")}
    marked = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    if unmarked := sorted(name for name in hooks - marked if hasattr(plugin, name)):
        raise TypeError(f"{', '.join(unmarked)} lacks the @hookimpl marker")


def _checked_names(offered: list[SpecType], taken: dict[str, SpecType]) -> dict[str, SpecType]:
    """The offers by name and alias; raises on one that cannot be used."""
    names: dict[str, SpecType] = {}
    for spec_type in offered:
        if not isinstance(spec_type, SpecType):
            raise TypeError(f"register() takes a SpecType, not {type(spec_type).__name__}")
        if spec_type.factory is None and not spec_type.needs_head:
            raise ValueError(f"spec type {spec_type.name!r} has no factory to make its drafter")
        for name in (spec_type.name, *spec_type.aliases):
            if not name or "," in name or name.split() != [name]:
                raise ValueError(f"a spec type cannot be called {name!r}")
            if name in RESERVED or name in taken or name in names:
                raise ValueError(f"the name {name!r} is taken")
            names[name] = spec_type
    return names


def _report(name: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    if _broken.get(name) != reason:
        _broken[name] = reason
        _log.warning(
            "llama-mtp skips the plugin %s (%s). Fix or uninstall it, or set %s=%s.",
            *(name, reason, BLOCK_VARIABLE, name),
        )
