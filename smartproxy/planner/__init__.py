"""Where a model goes, who makes room for it, and why. PURE: a Snapshot in, a Decision out.

Knows the policy: order of loads, choice of GPUs, shapes, victims, and the reasons in words and
numbers. The same snapshot always gives the same decision. What a model needs is a black box here.
May import: memory, values of gpus, errors, types, and of the standard library what has no disk,
clock, process, network or log in it.
"""
