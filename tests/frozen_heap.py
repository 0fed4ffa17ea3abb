"""Exclude the objects of all modules that are loaded before this one from garbage collections.

Otherwise each collection of a forked process would go through them, and copy the pages that they lie on.
"""

import gc

gc.collect()
gc.freeze()
