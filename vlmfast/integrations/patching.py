"""`patch`: replaces the layers of a model, in place and reversibly, by layers on fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple, NoReturn

from torch import nn

from vlmfast.backends import check_backend
from vlmfast.families import FAMILIES
from vlmfast.integrations.rules import BACKEND, LINEAR, MARK, Replacement, Rule, class_name

__all__ = ["PatchEntry", "PatchReport", "patch", "unpatch"]

# Asked in this order; torch comes last, for the other libraries derive from its classes.
LIBRARIES = ("open_clip", "timm", "torchvision", "transformers", "flamingo", "torch")

# Recognised by what its layers are made of, wherever their classes come from.
STRUCTURAL = "flamingo"


class PatchEntry(NamedTuple):
    """One layer: its module path, what it is now, and why it was replaced or left."""

    path: str
    what: str
    why: str


@dataclass
class PatchReport:
    """What `patch` did. `print(report)` shows it as a table."""

    replaced: list[PatchEntry] = field(default_factory=list)
    skipped: list[PatchEntry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"vlmfast.patch: {len(self.replaced)} replaced, {len(self.skipped)} left"]
        for title, entries in (("replaced", self.replaced), ("left", self.skipped)):
            if not entries:
                continue
            rows = [(title, "is now" if title == "replaced" else "is", "because"), *entries]
            rows = [(path or "(the model)", what, why) for path, what, why in rows]
            path_width, what_width = (max(len(row[i]) for row in rows) for i in (0, 1))
            lines += [f"  {p:{path_width}}  {w:{what_width}}  {y}".rstrip() for p, w, y in rows]
        return "\n".join(lines)


class _Step(NamedTuple):
    """What is to be done with one module; `rule` None: it stands replaced, set the backend."""

    path: str
    module: nn.Module
    rule: Rule | None


def patch(
    model: nn.Module,
    families: Iterable[str] | None = None,
    backend: str | None = None,
    strict: bool = False,
    filter: Callable[[str, nn.Module], bool] | None = None,
    inference: bool = False,
) -> PatchReport:
    """Replaces, in place, the layers of `model` that vlmfast computes faster. Same numbers.

    Parameters, buffers, hooks, train/eval state, dtype, device and state-dict keys stay the very
    same, so optimisers made before stay valid; `unpatch` restores the model exactly. A layer that
    occurs at several places of the model is replaced once and reported at its first path. Patching
    again changes nothing, except that it sets another `backend` or replaces other `families`.

    Args:
        families: the kernel families to use, by name; None: all. With `inference`, "linear" is one
            more.
        backend: forced for the replaced layers, see `vlmfast.use_backend`; None: by the inputs.
        strict: raise if a layer that vlmfast knows cannot be replaced. The model is then untouched.
        filter: called with (path, module) for each layer that vlmfast knows; False leaves it, and
            nothing else is then said of it, by `strict` either.
        inference: also replace every torch.nn.Linear by one that keeps its weight packed for
            oneDNN, which pays on the CPU where no gradient is asked for (elsewhere it computes as
            before). Takes the memory of the weights once more, and does not notice writes to them
            that torch does not record, as through `.data`: so for inference alone.

    Returns:
        A `PatchReport`: `replaced` and `skipped`, one (path, what, why) for each layer.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an unknown family or backend.
        RuntimeError: with `strict`, listing every layer that cannot be replaced and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if filter is not None and not callable(filter):
        raise TypeError(f"filter: expected a callable, got {type(filter).__name__}")
    for name, flag in (("strict", strict), ("inference", inference)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {type(flag).__name__}")
    known = (*FAMILIES, LINEAR) if inference else FAMILIES
    wanted = _check_families(families, known)
    if backend is not None:
        check_backend("backend", backend)

    report = PatchReport()
    steps: list[_Step] = []
    obstacles: list[PatchEntry] = []
    covered: set[nn.Module] = set()
    for path, module, rule in _known_layers(model, known, wanted):
        if rule is not None and module in covered:
            continue
        name = class_name(type(module))
        parent = model.get_submodule(path.rpartition(".")[0])
        if rule is None:
            done = module.__dict__[MARK]
            covered.update(map(module.get_submodule, done.covers))
            if done.family in wanted and getattr(module, BACKEND) != backend:
                steps.append(_Step(path, module, None))
            else:
                report.skipped.append(PatchEntry(path, done.what, "already replaced"))
        elif rule.family not in wanted:
            report.skipped.append(PatchEntry(path, name, f"{rule.family} is not asked for"))
        elif filter is not None and not filter(path, module):
            report.skipped.append(PatchEntry(path, name, "left out by the filter"))
        elif (why := rule.refusal(module) or rule.refusal_within(parent, module)) is not None:
            report.skipped.append(PatchEntry(path, name, why))
            obstacles.append(report.skipped[-1])
        elif rule.bypassed_by(parent) and all(step.module is not parent for step in steps):
            why = f"{class_name(type(parent))} around it stays, and goes past it in inference"
            report.skipped.append(PatchEntry(path, name, why))
            obstacles.append(report.skipped[-1])
        else:
            covered.update(map(module.get_submodule, rule.covers))
            steps.append(_Step(path, module, rule))

    if strict and obstacles:
        lines = (f"{path or '(the model)'}: {what}: {why}" for path, what, why in obstacles)
        raise RuntimeError("strict: these layers cannot be replaced\n" + "\n".join(lines))
    for path, module, rule in steps:
        if rule is None:
            setattr(module, BACKEND, backend)
            done = module.__dict__[MARK]
        else:
            done = _apply(rule, module, backend)
        report.replaced.append(PatchEntry(path, done.what, f"{done.family} for {done.original}"))
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`: every replaced layer becomes again what it was.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: something else has changed the class of a replaced layer since (torch's
            parametrisations and FSDP do). The model is then untouched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    patched = [(path, module) for path, module in model.named_modules() if MARK in module.__dict__]
    for path, module in patched:
        if module.__dict__[MARK].swapped_to not in (None, type(module)):
            raise RuntimeError(
                f"{path or '(the model)'}: its class was changed to {class_name(type(module))} "
                "after vlmfast.patch; undo that first"
            )
    for _, module in patched:
        done = module.__dict__[MARK]
        delattr(module, MARK)
        delattr(module, BACKEND)
        delattr(module, _BEFORE_SCRIPTING)
        done.restore(module)


def _apply(rule: Rule, module: nn.Module, backend: str | None) -> Replacement:
    original = type(module)
    restore = rule.replace(module)
    swapped_to = type(module) if type(module) is not original else None
    what = rule.what if isinstance(rule.what, str) else class_name(rule.what)
    done = Replacement(rule.family, what, class_name(original), swapped_to, restore, rule.covers)
    setattr(module, MARK, done)
    setattr(module, BACKEND, backend)
    setattr(module, _BEFORE_SCRIPTING, _refuse_scripting)
    return done


# What torch.jit.script asks of each module first.
_BEFORE_SCRIPTING = "__prepare_scriptable__"


def _refuse_scripting() -> NoReturn:
    raise RuntimeError(
        "torch.jit.script compiles the code of a library's layers, not of those that vlmfast.patch "
        "put in their place: vlmfast.unpatch before, or torch.jit.trace"
    )


def _check_families(families: Iterable[str] | None, known: tuple[str, ...]) -> frozenset[str]:
    if families is None:
        return frozenset(known)
    if isinstance(families, str) or not isinstance(families, Iterable):
        raise TypeError(f"families: expected a list of names, got {families!r}")
    try:
        wanted = tuple(families)
    except (TypeError, RuntimeError):  # 0-d arrays and nested tensors are not what they seem
        raise TypeError(f"families: expected a list of names, got {type(families)}") from None
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"families: expected a list of names, got {name!r} in it")
        if name not in known:
            raise ValueError(f"families: expected names of {', '.join(known)}; got {name!r}")
    return frozenset(wanted)


def _known_layers(
    model: nn.Module, families: tuple[str, ...], wanted: frozenset[str]
) -> Iterator[tuple[str, nn.Module, Rule | None]]:
    """The layers that a rule of the families recognises; None: the rule of a replaced layer.

    Of the rules that recognise a layer the first one counts that replaces it and is of a family
    that is wanted, else the first one.
    """
    rules_of: dict[type, list[Rule]] = {}
    for path, module in model.named_modules():
        if MARK in module.__dict__:
            yield path, module, None
            continue
        cls = type(module)
        if cls not in rules_of:
            rules_of[cls] = _rules_for(cls)
        rules = [r for r in rules_of[cls] if r.family in families and r.recognises(module)]
        if rules:
            replacing = (rule for rule in rules if rule.what and rule.family in wanted)
            yield path, module, next(replacing, rules[0])


def _rules_for(cls: type) -> list[Rule]:
    """The rules of the libraries that a class comes or derives from: no other is imported."""
    roots = {base.__module__.partition(".")[0] for base in cls.__mro__}
    present = [library for library in LIBRARIES if library in roots or library == STRUCTURAL]
    return [
        rule for name in present for rule in import_module(f"vlmfast.integrations.{name}").RULES
    ]
