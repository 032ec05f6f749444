"""Puts the library's operations into one transformers model, reversibly, with a report of every swap and skip.

    spec        what a patch is: which modules it claims, what it requires, which forward it builds
    registry    the model families, listed by hand
    session     ``patched(model)``: claim, check, swap, and on exit restore
    report      what was swapped, what was skipped, and why
    families/   one file per family, named like transformers' model type

Only instances are touched: a second model of the same class in the process stays as it is. Unlike the rest of the
package this part imports transformers.
"""

from __future__ import annotations
