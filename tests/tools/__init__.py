"""Programs that tests start, each in a separate environment, so that no tool holds back a dependency."""
