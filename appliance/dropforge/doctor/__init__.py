"""`dropforge doctor`: look at this machine, name every cause, say how to mend it.

limited.py      runs a program for a limited time, also one that a broken GPU holds
machine.py      Python packages, memory, container limits, shared memory, disk, llama.cpp
driver.py       what nvidia-smi says, driver against CUDA, device nodes
fatbin.py       which GPUs a compiled library carries code for
libraries.py    those lists for torch, bitsandbytes, vLLM and llama.cpp, against the GPUs that are here
trials.py       real work on every GPU, each kind in a process of its own (trial_process.py)
causes.py       error texts and what they mean
examination.py  all of it in order
"""
