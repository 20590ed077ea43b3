"""Hostile inputs: what no public function may take, misread or die of.

Every public function, module constructor and module call has a valid call in calls.py. From its
signature each argument in turn is replaced by every value of two tables in values.py: what no
argument of its kind ever is (a string, a list, a number beyond any dtype, ...), and what resembles
the right value (the same tensor in another dtype, layout, size, memory or class). Each try must end
in

    a refusal       ValueError, TypeError or NotImplementedError whose message names the argument;
                    where two arguments of right types do not fit each other, it may name the other
    a right result  the value is of the argument's annotated type, and the result is what the same
                    call gives on the reference backend for the same numbers in plain dense tensors,
                    gradients included where one is asked for; without data, its shape and dtype; of
                    a constructor, a module of finite parameters
    torch's answer  the very error or result of the torch layer that a module stands in for; or, for
                    a size that no memory holds, its allocator's error

Anything else is a finding: another exception, one that does not say which argument is wrong, a
wrong type that is taken, wrong numbers, a crash, a hang. The tries run in child processes, which
crash in the parent's stead.

    PYTHONPATH=.:tests python -m tools.hostile [--only NAME]
"""
