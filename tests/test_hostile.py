"""No hostile input is misread: every try of `tools.hostile` is refused clearly, or right."""

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn
from tools.hostile.calls import calls
from tools.hostile.children import run, summary
from tools.hostile.judge import arguments_of
from tools.hostile.values import ALIENS

EVERY = 4  # of the tries; `python -m tools.hostile` makes all


def test_every_input_is_refused_clearly_or_right():
    outcomes = run(every=EVERY)
    counts, findings = summary(outcomes)
    print(counts)
    assert not findings, "\n".join(findings)
    arguments = sum(len(arguments_of(call)) for call in calls())
    assert len(outcomes) >= arguments * len(ALIENS) // EVERY
    assert counts["tried"] >= 0.9 * len(outcomes)
    assert min(counts["refused"], counts["right"]) >= counts["tried"] // 10


def test_everything_public_is_tried():
    functions = [getattr(VF, name) for name in VF.__all__ if name != "CrossAttentionPlan"]
    modules = [getattr(vnn, name) for name in vnn.__all__]
    package = [vlmfast.patch, vlmfast.unpatch, vlmfast.explain, vlmfast.use_backend]
    tried = [call.function for call in calls()]
    for public in (*functions, *modules, *package):
        assert public in tried, public
    for cls in modules:
        assert any(isinstance(function, cls) for function in tried), cls


def test_planted_faults_are_found():
    counts, findings = summary(run("planted"))
    assert counts["refused"] and counts["right"] == 0
    for fault in (
        "an empty string: ended with -6",
        "0: raised RuntimeError",
        "1: raised ValueError: no idea",
        "a string: wrong: 1 numbers that are not finite",
        "2**31: took int",
    ):
        assert f"planted: how = {fault}" in "\n".join(findings)
