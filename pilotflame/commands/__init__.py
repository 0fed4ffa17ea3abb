"""Commands of `pilotflame`, a module for each noun; `pilotflame.cli` loads the one that is called."""
