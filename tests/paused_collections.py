"""Pause garbage collections while this process loads the modules after this one; `tests.frozen_heap` ends the pause."""

import gc

gc.disable()
