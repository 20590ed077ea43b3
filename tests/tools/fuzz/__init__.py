"""Random problems for the CPU kernels, held against float64 in memory that is guarded.

    make fuzz MINUTES=10
    make fuzz FUZZ_ARGS="--family cross_attention --seed 7"
    make fuzz FUZZ_ARGS="--repeat cross_attention:bfloat16:1234"

A case is one problem on one instruction set, forward and backward, and follows from its family,
dtype and seed alone. Inputs and gradients of outputs are laid out in random strides and lie next to
forbidden pages, with NaN in their gaps; outputs and the kernels' scratch end at forbidden pages,
too, and are full of NaN before they are written. Results must keep the error budget of
`vlmfast.verify.common`. Cases run in processes of their own, and one that dies is a finding.
"""
