"""The course module: pages that are read, run, changed and seen to move.

`course` says what a page is; `execution` runs its source once; `site`, `notebooks` and `server` show what came of it.
Nothing here imports torch: what is taught runs in kernels, each a process of its own (`kernels`).
"""
