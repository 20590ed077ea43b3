"""No hostile input is misread: every try of `hostile` is refused clearly, or right."""

import hostile

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn

EVERY = 4  # of the tries; `python tests/hostile.py` makes all


def test_every_input_is_refused_clearly_or_right():
    outcomes = hostile.run(every=EVERY)
    counts, findings = hostile.summary(outcomes)
    print(counts)
    assert not findings, "\n".join(findings)
    arguments = sum(len(hostile.arguments_of(call)) for call in hostile.calls())
    assert len(outcomes) >= arguments * len(hostile.ALIENS) // EVERY
    assert counts["tried"] >= 0.9 * len(outcomes)
    assert min(counts["refused"], counts["right"]) >= counts["tried"] // 10


def test_everything_public_is_tried():
    functions = [getattr(VF, name) for name in VF.__all__ if name != "CrossAttentionPlan"]
    modules = [getattr(vnn, name) for name in vnn.__all__]
    package = [vlmfast.patch, vlmfast.unpatch, vlmfast.explain, vlmfast.use_backend]
    tried = [call.function for call in hostile.calls()]
    for public in (*functions, *modules, *package):
        assert public in tried, public
    for cls in modules:
        assert any(isinstance(function, cls) for function in tried), cls


def test_planted_faults_are_found():
    counts, findings = hostile.summary(hostile.run("planted"))
    assert counts["refused"] and counts["right"] == 0
    for fault in (
        "an empty string: ended with -6",
        "0: raised RuntimeError",
        "1: raised ValueError: no idea",
        "a string: wrong: 1 numbers that are not finite",
        "2**31: took int",
    ):
        assert f"planted: how = {fault}" in "\n".join(findings)
