"""Everything that wants an NVIDIA GPU, in a few minutes of one: see `bench/gpu.sh`.

`plan.py` runs steps in their time and packs up what they leave; each step is a program of its own
that writes after everything it measures, so that it may be stopped at any time.
"""
