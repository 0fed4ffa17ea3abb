"""Tools that tests start as programs, each in an environment of its own: no tool holds back a dependency."""
