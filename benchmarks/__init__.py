"""Benchmarks: highcamp against its bounds, beside its peers and the physical limits.

    python -m benchmarks --quick          # every row with tiny states, to see that it works; its figures mean nothing
    python -m benchmarks --out docs       # the whole table; wants a quiet machine

Every contestant lives in a process of its own that takes orders, so they save in turns, in shuffled order, on the same
disk, with the same bytes. What is timed is also loaded again and compared, bit for bit.
"""
