"""The daemon: watches the inbox, queues, runs one child process per job, survives being killed at any moment.

One noun per file. `loop.py` reads top to bottom; the folder contract is docs/reference/folder-contract.md. Nothing here
imports torch: jobs live in child processes (`runner.py`).
"""
