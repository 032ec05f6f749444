"""Whole training steps against peers: forward, backward and optimizer of LoRA on one GPU.

    __main__     the command line; starts every engine in a process of its own
    models       the model shapes, batches and settings that are measured
    weights      writes a checkpoint of random weights and a tokenizer
    adapters     the same adapters, with B not zero, in every engine
    engines      loads a model the way each engine's users do
    ours         this library's settings: the planner's choice, the peers' policy, fixed policies
    measure      times one shape
    parity       loss and adapter gradients against fp32
    longest      the longest sequence that trains on a card of a given size
    slices       bf16 gradients of two layers against fp32, every policy and PEFT
    products     the matrix products of LoRA alone
    side_files   writes the CSVs of these two
    breakdown    where the time of one step goes
    records      the rows and the CSV
    page         text table and plot made from the CSV
    report       the documentation page made from the CSV

Run it as ``PYTHONPATH=appliance:kernels:kernels/benchmarks python -P -m steps run --help`` or ``make bench-steps``.
"""

from __future__ import annotations
